"""Upcycling: a mixture of experts that starts as copies of one trained network. Derived in chapter 14.

Every expert is the dense network h. If a token's gates add up to 1 and none is dropped, y = h(x), and the router gets
*exactly nothing*: all d_g_e = <d_y, h_e> are one number c, and d_z_S = g (c - c sum(g)) = 0. With K = 1, with gates
that are not divided, or with a dropped choice it gets something, whose direction depends on the sign of c. Expert e
collects g_e times the gradient of its tokens: copying has the adjoint "sum".

Source: Komatsuzaki et al. 2023, section 3; the vanishing gradient: derived here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from foundation.moe import moe_backward, moe_forward

Network = dict[str, Float[Array, "..."]]


def copy_experts_forward(dense: Network, experts: int) -> tuple[Network, tuple]:
    """{"w_gate" [E, D, F], "w_in" [E, D, F], "w_out" [E, F, D]}: each matrix of the dense network, E times."""
    return {name: jnp.repeat(matrix[None], experts, axis=0) for name, matrix in dense.items()}, ()


def copy_experts_backward(d_copies: Network, cache: tuple) -> Network:
    """What is copied collects the sum."""
    return {name: jnp.sum(d_matrices, axis=0) for name, d_matrices in d_copies.items()}


def upcycled_forward(
    x: Float[Array, "B T D"], dense: Network, router: Float[Array, "D E"], top_k: int, factor: float
) -> tuple[Float[Array, "B T D"], tuple]:
    """The layer at step 0: E copies of a dense network behind a router."""
    copies, copied = copy_experts_forward(dense, router.shape[-1])
    output, cache = moe_forward(x, {"router": router, **copies}, top_k, factor)
    return output.y, (cache, copied)


def upcycled_backward(
    d_y: Float[Array, "B T D"], cache: tuple
) -> tuple[Float[Array, "B T D"], Network, Float[Array, "D E"]]:
    """(d_x, d_dense, d_router)."""
    layer, copied = cache
    zero = jnp.zeros((), d_y.dtype)
    d_x, d_params = moe_backward(d_y, zero, zero, layer)
    d_router = d_params.pop("router")
    return d_x, copy_experts_backward(d_params, copied), d_router
