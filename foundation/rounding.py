"""Why can a small step vanish? Numbers with 8 bits of mantissa.

A float32 has 1 bit for the sign, 8 for the exponent and 23 for the mantissa, whose leading 1 is not stored. A bfloat16
is the upper half of these 32 bits: 7 stored bits of mantissa, 8 with the leading 1. So the bfloat16 numbers in
[2^e, 2^(e+1)) lie 2^(e-7) apart. Read as integers, the patterns of one sign are in the order of the magnitudes, and
neighbours differ by 1, also where the exponent changes.

**To nearest.** Cut off the lower half, and add 1 to the upper half if the lower half is more than a half of 2^16. If it
is exactly a half, take the even neighbour. Adding 0x7FFF, and the last bit of the upper half, before the cut does all
of this by one carry. With s the spacing on the side of the step, a weight w does not move for a step smaller than
s / 2. Below a power of two, s is half of what it is above. Any step below w / 512 is lost, however often it is taken.

**By a draw.** Instead, add a random number that is uniform in {0, ..., 2^16 - 1}, and cut. Let `lower` be the number
in the lower half. The sum carries for `lower` of the 2^16 draws, so x goes up with the probability lower / 2^16. This
is its distance from the lower neighbour in units of the spacing. With f this fraction,

    E[rounded x] = (1 - f) down + f (down + s) = down + f s = x

exactly. One step is still lost or doubled; the *sum* of many steps is right on average. Its variance is f (1 - f) s^2
for each step, so after n steps the error is about s sqrt(n f (1 - f)), beside a distance of n f s.

**Long sums.** A running sum in bfloat16 stops to grow when its terms are below half its spacing: 1 + 1 + 1 + ... ends
at 256. So products are rounded on the way in, and summed in float32.

**Fewer exponents.** A float16 has 11 bits of mantissa but only 5 of exponent. Below 2^-14 its spacing stays 2^-24, so
small gradients lose bits, and vanish below 2^-25. Multiply the loss by S = 2^k: by the chain rule every gradient is
multiplied by S. Rounding keeps the leading 11 bits, wherever the point is, so with a power of two

    round(S g) / S = round to 11 bits of g

and S cancels *exactly*, while S |g| is from 2^-14 to 65504. With another S the digits change.

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
