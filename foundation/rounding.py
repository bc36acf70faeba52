"""Numbers with 8 bits of mantissa: rounded to nearest, rounded by a draw, summed, and scaled. Derived in chapter 17.

A bfloat16 is the upper half of a float32. In [2^e, 2^(e+1)) its numbers lie 2^(e-7) apart, and the patterns of
neighbours, read as integers, differ by 1.

    to nearest     add 0x7FFF and the last bit of the upper half, then cut: a carry rounds, a tie goes to the even one
    by a draw      add a uniform number of 16 bits, then cut: x goes up with probability lower / 2^16, so E = x exactly
    running sum    stops to grow where the terms are below half its spacing: ones add up to 256
    float16        11 bits, 5 of exponent: below 2^-14 the spacing stays 2^-24
    scale 2^k      round(S g) / S = round to 11 bits of g, while S |g| is from 2^-14 to 65504

Sources: Gupta et al. 2015, section 3 (stochastic rounding); Kalamkar et al. 2019, section 3 (bfloat16); Micikevicius
et al. 2018, sections 3.2 and 3.3 (loss scaling, sums in float32).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16, UInt32

HALF = 1 << 16
"""Patterns of the lower half of a float32."""


def bits_of(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """The 32 bits of x as a float32."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def value_of(upper: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """The number whose upper half is given: a bfloat16, exact in float64."""
    bits = upper.astype(jnp.uint32) * HALF
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.float64)


def nearest_bits(bits: UInt32[Array, "..."]) -> UInt16[Array, "..."]:
    """The upper half of the nearest bfloat16, a tie to the even one. For finite numbers."""
    even = (bits // HALF) & 1
    return ((bits + 0x7FFF + even) // HALF).astype(jnp.uint16)


def drawn_bits(bits: UInt32[Array, "..."], draw: UInt32[Array, "..."]) -> UInt16[Array, "..."]:
    """One of the two neighbours. `draw` is uniform in [0, 2^16). For finite numbers."""
    return ((bits + draw) // HALF).astype(jnp.uint16)


def mean_of_draws(x: Float[Array, " N"]) -> Float[Array, " N"]:
    """The mean of `drawn_bits` over all 2^16 draws: no draw is left out, and none is sampled."""
    draws = jnp.arange(HALF, dtype=jnp.uint32)
    return jax.lax.map(lambda bits: jnp.mean(value_of(drawn_bits(bits, draws))), bits_of(x))


def running_sum(terms: Float[Array, " N"]) -> Float[Array, " N"]:
    """The sums after each term, each rounded to bfloat16 before the next term is added."""

    def add(total: Array, term: Array) -> tuple[Array, Array]:
        total = value_of(nearest_bits(bits_of(total + term)))
        return total, total

    return jax.lax.scan(add, jnp.zeros((), jnp.float64), terms)[1]


def to_float16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest float16, a tie to the even one; infinite from 65520 on."""
    _, exponent = jnp.frexp(x)  # |x| is in [2^(exponent - 1), 2^exponent)
    spacing = jnp.ldexp(jnp.ones_like(x), jnp.maximum(exponent, -13) - 11)
    rounded = jnp.round(x / spacing) * spacing
    return jnp.where(jnp.abs(rounded) > 65504.0, jnp.sign(x) * jnp.inf, rounded)


def through_scale(gradient: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, "..."]:
    """A gradient as it comes out of a backward pass in float16 whose loss was multiplied by `scale`."""
    return to_float16(gradient * scale) / scale
