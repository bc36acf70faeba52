"""What can be derived of chapters 17 and later."""

from foundation.challenges.challenge import Challenge

SYSTEM_CHALLENGES: dict[str, Challenge] = {
    "nearest_bits": Challenge(
        "rounding",
        "nearest_bits",
        (
            "Add something to the 32 bits, so that the carry into the upper half does the rounding, and cut.",
            "Adding 0x8000 rounds to nearest, but takes a tie away from zero.",
            "Add 0x7FFF, and 1 more where the upper half is odd.",
        ),
        task="The upper half of the bfloat16 nearest to the float32 with these bits. Of two equally near ones, the one "
        "whose last bit is 0. bits // 65536 is the upper half.",
        results=("upper",),
    ),
    "to_float16": Challenge(
        "rounding",
        "to_float16",
        (
            "Find the spacing of float16 numbers around x (jnp.frexp gives the exponent). Round x to a multiple of it.",
            "11 bits of mantissa: in [2^(e-1), 2^e) the spacing is 2^(e-11), and it never falls below 2^-24.",
            "jnp.ldexp(1.0, n) is 2^n exactly, which jnp.exp2 need not be. Above 65504 the answer is infinite.",
        ),
        task="The float16 nearest to x, as a number of x's own type; of two equally near, the even one. Without "
        "jnp.float16.",
        results=("rounded",),
    ),
    "coded_product": Challenge(
        "small_weights",
        "coded_product",
        (
            "y_o = s_o u_o with u = x @ codes. Both x and the scales have a gradient; codes have none.",
            "d_u = d_y * scale, so d_x = d_u @ codes.T.",
            "d_scale_o is the sum over tokens of d_y_to u_to: u is in the cache.",
        ),
    ),
    "moved_by_one": Challenge(
        "small_weights",
        "moved_by_one",
        (
            "Minimise d^T H d where d_k = error. With a multiplier: 2 H d = mu e_k.",
            "d is in proportion to column k of the inverse. d_k = error gives the factor.",
            "(error * inverse[:, k] / inverse[k, k], error**2 / inverse[k, k])",
        ),
        task="Weight k of an output is off by `error`. inverse is H^-1, [D, D]. The change d, [D], of all weights with "
        "d_k = error that makes L = d^T H d least, and this L.",
        results=("d", "L"),
    ),
    "all_gather": Challenge(
        "collectives",
        "all_gather",
        (
            "Part s of every rank's output came from rank s. How many copies of x_s are there?",
            "d_x_s is the sum over ranks r of part s of d_y_r. Split the last axis of d_y into parts first.",
            "jnp.sum(d_y, axis=0).reshape(len(d_y), -1), which is a reduce_scatter.",
        ),
    ),
    "expert_parallel": Challenge(
        "collectives",
        "expert_parallel",
        (
            "Walk the forward pass backwards: combine, all_to_all, expert, all_to_all, dispatch.",
            "d_results = place^T (gate d_y), swap the first two axes, and the experts have d_answers.",
            "d_weights = rows^T d_answers, where the expert is. d_answers W^T, swapped again, are d_rows at home.",
        ),
    ),
    "expected_reward": Challenge(
        "preferences",
        "expected_reward",
        (
            "dJ/d log pi(y) = pi(y) r(y): J is a sum of exp(log pi) r.",
            "A baseline changes nothing in the end, because sum_y pi(y) d log pi(y) = 0.",
            "text_log_probs_backward(d_value * exp(log_pi) * (reward - value), cache of text_log_probs).",
        ),
    ),
    "dpo": Challenge(
        "preferences",
        "dpo",
        (
            "L = log(1 + exp(-m)), so dL/dm = -sigmoid(-m) = -1 / (1 + exp(m)).",
            "dm/d chosen = beta and dm/d rejected = -beta. The loss is a mean over pairs.",
            "d_chosen = -d_loss * beta / (1 + exp(margin)) / (number of pairs), and d_rejected its negative.",
        ),
    ),
}
