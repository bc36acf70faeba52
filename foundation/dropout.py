"""Dropout with a given mask: y = x keep / (1 - rate), and d_x the same of d_y. One draw serves both passes.

Source: Srivastava et al. 2014, section 4; the 1/(1 - rate) at training time ("inverted") from their section 10.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dropout_forward(
    x: Float[Array, "*shape"], keep: Bool[Array, "*shape"] | None, rate: float
) -> tuple[Float[Array, "*shape"], tuple]:
    """y = x / (1 - rate) where `keep`, else 0: the mean over masks is x. Without a mask, y = x (evaluation)."""
    if keep is None:
        return x, (None, rate)
    return jnp.where(keep, x / (1.0 - rate), 0.0), (keep, rate)


def dropout_backward(d_y: Float[Array, "*shape"], cache: tuple) -> Float[Array, "*shape"]:
    """d_x: the same mask and the same scale."""
    keep, rate = cache
    if keep is None:
        return d_y
    return jnp.where(keep, d_y / (1.0 - rate), 0.0)
