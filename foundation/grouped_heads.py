"""What later models add between the projections and the attention: shared key heads, normalised queries and keys.

Grouped-query attention has KV heads of keys and values for H heads of queries; head h reads key head g = h // (H / KV).
Copying is linear, and its adjoint is the sum over the copies: d_k'_g = sum of d_k_h over the heads h of group g.

Queries and keys are normalised by RMSNorm (norms.py): each head by itself, rows of A numbers, or all heads together,
one row of H A numbers, where the mean couples the heads. The length of the scale tells which.

Sources: Ainslie et al. 2023, section 2.2; Dehghani et al. 2023, section 2.1 (each head, there with LayerNorm);
Muennighoff et al. 2024, section 4.2 (all heads together).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from foundation.norms import RMSNORM_EPS, rmsnorm_backward, rmsnorm_forward


def share_heads_forward(x: Float[Array, "B KV T A"], heads: int) -> tuple[Float[Array, "B H T A"], tuple]:
    """y_h = x_g: every head of x is read by the H / KV heads of its group."""
    shared = x.shape[1]
    return jnp.repeat(x, heads // shared, axis=1), (shared,)


def share_heads_backward(d_y: Float[Array, "B H T A"], cache: tuple) -> Float[Array, "B KV T A"]:
    """d_x: the sum over the heads of a group."""
    (shared,) = cache
    batch, _, positions, width = d_y.shape
    return jnp.sum(d_y.reshape(batch, shared, -1, positions, width), axis=2)


def normalise_heads_forward(
    x: Float[Array, "B T HA"], scale: Float[Array, " N"], eps: float = RMSNORM_EPS
) -> tuple[Float[Array, "B T HA"], tuple]:
    """RMSNorm of rows of len(scale) numbers: of each head, or of all heads together."""
    y, cache = rmsnorm_forward(x.reshape(*x.shape[:2], -1, scale.shape[0]), scale, eps)
    return y.reshape(x.shape), cache


def normalise_heads_backward(
    d_y: Float[Array, "B T HA"], cache: tuple
) -> tuple[Float[Array, "B T HA"], Float[Array, " N"]]:
    """(d_x, d_scale). All rows have one scale, so its gradient is a sum over the heads too."""
    n, _, _ = cache
    d_x, d_scale = rmsnorm_backward(d_y.reshape(n.shape), cache)
    return d_x.reshape(d_y.shape), d_scale
