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
}
