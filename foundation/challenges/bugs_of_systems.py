"""Bugs of chapters 17 and later: numbers of few bits."""

from foundation.challenges.planting import Bug

BUGS_OF_SYSTEMS = [
    Bug("nearest: cut off, not rounded", "rounding.nearest_bits", "bits + 0x7FFF + even", "bits", "nearest_bits"),
    Bug(
        "nearest: a tie goes away from zero",
        "rounding.nearest_bits",
        "bits + 0x7FFF + even",
        "bits + 0x8000",
        "nearest_bits",
    ),
    Bug("draw: rounds to nearest", "rounding.drawn_bits", "bits + draw", "bits + 0x7FFF", "drawn_bits"),
    Bug("draw: one bit short", "rounding.drawn_bits", "bits + draw", "bits + draw // 2", "drawn_bits"),
    Bug(
        "draw: the largest is never drawn",
        "rounding.mean_of_draws",
        "jnp.arange(HALF,",
        "jnp.arange(HALF - 1,",
        "mean_of_draws",
    ),
    Bug(
        "draw: the mean of the nearest",
        "rounding.mean_of_draws",
        "drawn_bits(bits, draws)",
        "nearest_bits(bits + 0 * draws)",
        "mean_of_draws",
    ),
    Bug(
        "sum: rounded once, at the end",
        "rounding.running_sum",
        "        total = value_of(nearest_bits(bits_of(total + term)))\n        return total, total",
        "        total = total + term\n        return total, value_of(nearest_bits(bits_of(total)))",
        "running_sum",
    ),
    Bug(
        "sum: the terms are rounded, and the sum is not",
        "rounding.running_sum",
        "value_of(nearest_bits(bits_of(total + term)))",
        "total + value_of(nearest_bits(bits_of(term)))",
        "running_sum",
    ),
    Bug(
        "float16: small numbers keep all their bits",
        "rounding.to_float16",
        "jnp.maximum(exponent, -13)",
        "exponent",
        "to_float16",
    ),
    Bug("float16: 10 bits of mantissa, not 11", "rounding.to_float16", "- 11)", "- 10)", "to_float16"),
    Bug(
        "float16: what is too large stays finite",
        "rounding.to_float16",
        "jnp.sign(x) * jnp.inf",
        "jnp.sign(x) * 65504.0",
        "test:test_a_float16_ends_at_65504",
    ),
    Bug(
        "scale: not divided out",
        "rounding.through_scale",
        "to_float16(gradient * scale) / scale",
        "to_float16(gradient * scale)",
        "through_scale",
    ),
    Bug(
        "scale: multiplied in after rounding",
        "rounding.through_scale",
        "to_float16(gradient * scale) / scale",
        "to_float16(gradient)",
        "through_scale",
    ),
]
