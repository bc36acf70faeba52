"""LoRA: a trained matrix stays, and a product of two thin ones learns beside it. Derived in chapter 14.

    y = x W + s (x A) B        A is [I, R], B is [R, O], s = alpha / R, and W is not trained
    u = x A                    d_B = s u^T d_y      d_u = s d_y B^T      d_A = x^T d_u      d_x = d_y W^T + d_u A^T

At the start B = 0: y is that of W alone, to the bit, and A gets exactly nothing in the first step.

Source: Hu et al. 2021 ("LoRA"), section 4.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from foundation.linear import linear_backward, linear_forward


def low_rank_forward(
    x: Float[Array, "*rows I"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    kernel: Float[Array, "I O"],
    scale: float,
) -> tuple[Float[Array, "*rows O"], tuple]:
    """y = x W + s (x A) B."""
    u, thin = linear_forward(x, a)
    added, wide = linear_forward(u, b)
    return x @ kernel + scale * added, (thin, wide, kernel, scale)


def low_rank_backward(
    d_y: Float[Array, "*rows O"], cache: tuple
) -> tuple[Float[Array, "*rows I"], Float[Array, "I R"], Float[Array, "R O"]]:
    """(d_x, d_a, d_b). The kernel stays as it is, so its gradient is not computed."""
    thin, wide, kernel, scale = cache
    d_u, d_b, _ = linear_backward(scale * d_y, wide)
    d_x, d_a, _ = linear_backward(d_u, thin)
    return d_y @ kernel.T + d_x, d_a, d_b


def merged(
    kernel: Float[Array, "I O"], a: Float[Array, "I R"], b: Float[Array, "R O"], scale: float
) -> Float[Array, "I O"]:
    """W + s A B: one matrix again, for a program that knows nothing of adapters."""
    return kernel + scale * jnp.matmul(a, b)
