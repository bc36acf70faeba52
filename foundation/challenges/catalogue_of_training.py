"""What can be derived of chapters 10 and later."""

from foundation.challenges.challenge import Challenge

TRAINING_CHALLENGES: dict[str, Challenge] = {
    "steepest_step": Challenge(
        "steepest",
        "steepest_step",
        (
            "Look for the step of size 1 with the smallest <g, d>. It has the opposite direction of something.",
            "Largest entry: each entry is free in [-1, 1]. Spectral: write g = U S V^T, and look at U^T d V.",
            "-g / |g|; -sign(g); -U V^T.",
        ),
        task="The step d of size 1 along which the loss falls fastest: the smallest <gradient, d>. size names what is "
        'measured: "euclidean" (root of the sum of squares), "entries" (largest entry), "spectral" (largest singular '
        "value).",
        results=("step",),
    ),
    "orthogonalize": Challenge(
        "optimizers",
        "orthogonalize",
        (
            "X X^T = U S^2 U^T, so a X + b (X X^T) X + c (X X^T)^2 X has the singular values a s + b s^3 + c s^5.",
            "Divide by the Frobenius norm plus eps first. Work on the transpose where it has fewer rows.",
            "steps times: gram = x @ x.T; x = a * x + (b * gram + c * gram @ gram) @ x.",
        ),
        task="Newton-Schulz: `steps` times the quintic with the coefficients NEWTON_SCHULZ on the singular values of "
        "the matrix divided by (its Frobenius norm + eps), without a singular value decomposition. The number of steps "
        "is NEWTON_SCHULZ_STEPS, and eps is 1e-8, unless given.",
        results=("orthogonal",),
    ),
    "divergence": Challenge(
        "adafactor",
        "divergence",
        (
            "w = r c^T: w_ij depends on r_i and c_j. Of v log(v / w) - v + w, only -v log w + w depends on w.",
            "dD/dr_i = sum_j (c_j - v_ij / r_i).",
            "sum(c) - (row sums of v) / r, and sum(r) - (column sums of v) / c.",
        ),
    ),
    "rank_one_fit": Challenge(
        "adafactor",
        "rank_one_fit",
        (
            "Set both gradients of the divergence to 0: r_i = (row sum i) / sum(c), c_j = (column sum j) / sum(r).",
            "Multiply the two. What is sum(r) sum(c)?",
            "(row sum i) (column sum j) / (sum of all).",
        ),
        task="The matrix r c^T that is nearest to `square` (positive entries) in the divergence of chapter 10: the "
        "sum of v log(v / w) - v + w.",
        results=("fit",),
    ),
    "merge_parts": Challenge(
        "flash_attention",
        "merge_parts",
        (
            "l1 is a sum of e^(score - m1). What is the sum of e^(score - m), for another m?",
            "Take m = max(m1, m2): then each e^(...) is at most 1. Multiply l1 and o1 by e^(m1 - m), and so on.",
            "Where both pieces saw nothing, m is -inf; shift by 0 there, or -inf - (-inf) gives NaN.",
        ),
        task="A query has seen two pieces of the keys. Of each piece it knows m, the largest score; l, the sum of "
        "e^(score - m); and o, the sum of e^(score - m) v. Give m, l and o of both together. m and l are [..., T], o "
        "is [..., T, W]. A piece in which nothing is seen has m = -inf, l = 0 and o = 0.",
        results=("m", "l", "o"),
    ),
    "flash_attention": Challenge(
        "flash_attention",
        "flash_attention",
        (
            "The gradients are those of attention; only P is computed again, tile by tile: e^(scores - logsumexp).",
            "softmax_backward needs the row sum of d_P P. It equals the row sum of d_o o, so it is known at once.",
            "d_q adds over tiles; d_k and d_v are put together. tile_scores gives the scores of a tile.",
        ),
    ),
    "decode": Challenge(
        "caching",
        "decode",
        (
            "prefill(x, params, heads, room) gives the outputs of a prompt, and a cache with room for `room` ones.",
            "decode_step(x, params, heads, cache, position) takes one position, [B, 1, D], and gives a new cache.",
            "The room is T. Put the outputs together along axis 1.",
        ),
        task="Causal attention over x, [B, T, D]: the first `prompt` positions at once by prefill, the others one by "
        "one by decode_step.",
        results=("y",),
    ),
    "kept_choices": Challenge(
        "caching",
        "kept_choices",
        (
            "A rank: 0 for a token's likeliest expert. A token wants an expert where its rank is below top_k.",
            "A token keeps what it wants where fewer than C tokens that want it come before. comes_before(keys) helps.",
            'keys of "token": (position,); "choice": (rank, position); "batch": (rank, -largest p, position); '
            '"expert": (-p, position), where every token wants every expert.',
        ),
        task="Which experts each of T tokens gets a slot of, [T, E], True or False. probs is [T, E]. Each token wants "
        "its top_k likeliest experts. An expert has capacity(T, E, top_k, factor) slots. rule says who comes first: "
        '"none" (no limit), "token", "token, growing" (capacity of the t + 1 tokens so far), "choice", "batch", '
        '"expert" (here every token wants every expert).',
        results=("keep",),
    ),
    "accumulated_loss": Challenge(
        "micro_batches",
        "accumulated_loss",
        (
            "cross_entropy_backward gives the gradient of one micro-batch's own mean.",
            "The loss is the sum of share times mean. So each mean gets the cotangent d_loss times its share.",
            "Put the gradients together along axis 0.",
        ),
    ),
    "grouped_balance": Challenge(
        "micro_batches",
        "grouped_balance",
        (
            "f counts choices, so it is a constant. P of a group is a mean over the sequences and tokens of the group.",
            "E / G in front, 1 / (tokens of a group) from the mean: E f / (B T) in all.",
            "Each of the B / G sequences of a group gets the f of its group; every token of it the same.",
        ),
    ),
    "upcycled": Challenge(
        "upcycling",
        "upcycled",
        (
            "The layer's backward pass is moe_backward(d_y, d_balance, d_z, cache); both losses have the cotangent 0.",
            "It gives d_x and a dict with the gradients of the router and of the E copies of each matrix.",
            "The router's gradient is a result; the copies' go through copy_experts_backward. Order: d_x, d_dense, "
            "d_router.",
        ),
    ),
    "filtered_law": Challenge(
        "sampling",
        "filtered_law",
        (
            "Temperature first, then a softmax. rank = argsort of argsort of -logits: 0 is the likeliest token.",
            "top-p: a token stays if the mass of the likelier tokens is below top_p. min-p: p >= min_p * max p.",
            "Keep where all filters that are on agree, and always rank 0. Divide what is left by its sum.",
        ),
        task="The law of the next token, [V]. logits are divided by temperature (0 takes the likeliest). top_k keeps "
        "the k likeliest (0 is off), top_p the fewest likeliest that together reach top_p (1 is off), min_p those "
        "with at least min_p times the largest probability. All filters look at the law after temperature. The "
        "settings are plain numbers.",
        results=("law",),
    ),
    "speculative_law": Challenge(
        "sampling",
        "speculative_law",
        (
            "Token x comes out in two ways: proposed and accepted, or drawn after something was rejected.",
            "accepted_mass(p, q) gives the first. Something is rejected with 1 minus its sum.",
            "accepted + rejected * residual_law(p, q).",
        ),
        task="The law of the token that comes out, [..., V]: the draft proposes x from q and it is accepted with "
        "probability min(1, p_x / q_x), else one is drawn from the residual. (You know the answer. Add up both ways.)",
        results=("law",),
    ),
    "importance_loss": Challenge(
        "balancing",
        "importance_loss",
        (
            "L = E Q / S^2 - 1, with S the sum of all I and Q the sum of their squares. Both depend on every I_e.",
            "dL/dI_e = 2 E I_e / S^2 - 2 E Q / S^3.",
            "I_e is a sum over tokens, so every token's p_te gets the gradient of I_e: broadcast to [T, E].",
        ),
    ),
    "biased_choice": Challenge(
        "balancing",
        "biased_choice",
        (
            "Rank the experts of each token by probs + bias: argsort of argsort of its negative.",
            "The bias chooses, and no more: gates are probs where chosen, and 0 elsewhere.",
            "Divide each row of gates by its sum.",
        ),
        task="For each token its top_k experts by probs + bias: chosen, [T, E], True or False. And gates, [T, E]: "
        "probs of the chosen ones, divided by their sum, and 0 elsewhere.",
        results=("chosen", "gates"),
    ),
}
