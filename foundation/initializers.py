"""Starting weights, each with the variance that it predicts.

One affine map of fan_in independent inputs multiplies the variance of a signal by fan_in * Var(W) going
forward, and that of a gradient by fan_out * Var(W) going backward. Twenty layers raise the factor to the
twentieth power, so it has to be about 1:

    LeCun    Var = 1 / fan_in                keeps the forward signal (linear, tanh near 0)
    Xavier   Var = 2 / (fan_in + fan_out)    the compromise between the two directions
    He       Var = 2 / fan_in                makes up for ReLU, which removes half of the second moment
    residual Var = std^2 / (2L)              the 2L branches of a stream add up to what one would without the 1 / (2L)

For the last: a branch adds h W, whose variance is fan_in E[h^2] Var(W). The 2L branches together add fan_in E[h^2]
std^2, whatever L is. It is not std^2: with std = 0.02, fan_in = 128 and E[h^2] = 1 it is 128 times that, 0.05.

Sources: LeCun et al. 1998 ("Efficient BackProp"), equation 16; Glorot and Bengio 2010, equations 12 and 16;
He et al. 2015, equation 10; Radford et al. 2019, section 2.3 (1/sqrt(N) at residual layers).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Shape = tuple[int, ...]


def fans(shape: Shape) -> tuple[int, int]:
    """(fan_in, fan_out) of a kernel [..., I, O]: leading axes, such as that of the experts, are copies.

    Raises ValueError where there are fewer than two axes.
    """
    if len(shape) < 2:
        raise ValueError(f"a kernel has at least two axes, got {shape}")
    return shape[-2], shape[-1]


def zeros(key: Array, shape: Shape) -> Float[Array, "..."]:
    """All zero. Right for biases; for a hidden layer every unit stays the same as the next for ever."""
    return jnp.zeros(shape)


def normal(key: Array, shape: Shape, std: float = 0.02) -> Float[Array, "..."]:
    """Normal with a fixed standard deviation: Var = std^2 whatever the width."""
    return std * jax.random.normal(key, shape)


def xavier_uniform(key: Array, shape: Shape) -> Float[Array, "..."]:
    """Uniform in [-a, a] with a = sqrt(6 / (fan_in + fan_out)): a uniform's variance is a^2 / 3."""
    limit = math.sqrt(3.0 * predicted_variance("xavier", shape))
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def he_normal(key: Array, shape: Shape) -> Float[Array, "..."]:
    """Normal with Var = 2 / fan_in."""
    return normal(key, shape, math.sqrt(predicted_variance("he", shape)))


def lecun_normal(key: Array, shape: Shape) -> Float[Array, "..."]:
    """Normal with Var = 1 / fan_in."""
    return normal(key, shape, math.sqrt(predicted_variance("lecun", shape)))


def residual_scaled(key: Array, shape: Shape, layers: int, std: float = 0.02) -> Float[Array, "..."]:
    """Normal with std / sqrt(2L), for the projections that write into the residual stream."""
    return normal(key, shape, std / math.sqrt(2.0 * layers))


def predicted_variance(name: str, shape: Shape) -> float:
    """Var(W) that an initializer of `INITIALIZERS` promises for a kernel of this shape.

    Raises KeyError for an unknown name.
    """
    fan_in, fan_out = fans(shape)
    return {
        "zeros": 0.0,
        "normal": 0.02**2,
        "xavier": 2.0 / (fan_in + fan_out),
        "he": 2.0 / fan_in,
        "lecun": 1.0 / fan_in,
    }[name]


INITIALIZERS: dict[str, Callable[[Array, Shape], Array]] = {
    "zeros": zeros,
    "normal": normal,
    "xavier": xavier_uniform,
    "he": he_normal,
    "lecun": lecun_normal,
}
