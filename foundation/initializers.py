"""Starting weights of a kernel [..., I, O], each with the variance that it promises. Derived in chapter 3.

    LeCun    Var = 1 / I          keeps the forward signal (linear, tanh near 0)
    Xavier   Var = 2 / (I + O)    the compromise between the two directions
    He       Var = 2 / I          makes up for ReLU, which removes half of the second moment
    residual Var = std^2 / (2L)   the 2L branches of a stream add up to I E[h^2] std^2, whatever L is

Sources: LeCun et al. 1998 ("Efficient BackProp"), equation 16; Glorot and Bengio 2010, equations 12 and 16; He et al.
2015, equation 10; Radford et al. 2019, section 2.3 (1/sqrt(N) at residual layers).
"""

import math

import jax
from jaxtyping import Array, Float

Shape = tuple[int, ...]
INITIALIZERS = ("zeros", "normal", "xavier", "he", "lecun")


def predicted_variance(name: str, shape: Shape) -> float:
    """Var(W) that one of `INITIALIZERS` promises. Leading axes, such as that of the experts, are copies."""
    fan_in, fan_out = shape[-2:]
    return {
        "zeros": 0.0,
        "normal": 0.02**2,
        "xavier": 2.0 / (fan_in + fan_out),
        "he": 2.0 / fan_in,
        "lecun": 1.0 / fan_in,
    }[name]


def initialised(name: str, key: Array, shape: Shape) -> Float[Array, "..."]:
    """A kernel of one of `INITIALIZERS`: normal, and Xavier's uniform in [-a, a], whose variance is a^2 / 3."""
    variance = predicted_variance(name, shape)
    if name == "xavier":
        limit = math.sqrt(3.0 * variance)
        return jax.random.uniform(key, shape, minval=-limit, maxval=limit)
    return normal(key, shape, math.sqrt(variance))


def normal(key: Array, shape: Shape, std: float = 0.02) -> Float[Array, "..."]:
    """Normal with a fixed standard deviation, whatever the width."""
    return std * jax.random.normal(key, shape)


def residual_scaled(key: Array, shape: Shape, layers: int, std: float = 0.02) -> Float[Array, "..."]:
    """Normal with std / sqrt(2L), for the projections that write into the residual stream."""
    return normal(key, shape, std / math.sqrt(2.0 * layers))
