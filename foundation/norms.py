"""LayerNorm and RMSNorm. Derived in chapter 6.

RMSNorm, r = (mean(x^2) + eps)^(-1/2), n = x r, y = scale n. With d_n = scale d_y and dr/dx_j = -r^3 x_j / D,

    d_x = r (d_n - n mean(d_n n))

LayerNorm first subtracts the mean of x, and so the mean of the gradient last. mean(n) = 0, so

    d_x = r (d_n - mean(d_n) - n mean(d_n n))

Sources: Ba, Kiros and Hinton 2016, equations 3 and 4; Zhang and Sennrich 2019, equation 4 and section 4.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LAYERNORM_EPS = 1e-5
RMSNORM_EPS = 1e-6


def layernorm_forward(
    x: Float[Array, "*rows D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None = None,
    eps: float = LAYERNORM_EPS,
) -> tuple[Float[Array, "*rows D"], tuple]:
    """y = scale (x - mean) / sqrt(variance + eps) + bias, statistics over the last axis (biased variance)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    n = centred * rstd
    y = n * scale
    if bias is not None:
        y = y + bias
    return y, (n, rstd, scale, bias is not None)


def layernorm_backward(
    d_y: Float[Array, "*rows D"], cache: tuple
) -> tuple[Float[Array, "*rows D"], Float[Array, " D"], Float[Array, " D"] | None]:
    """(d_x, d_scale, d_bias); d_bias is None where the forward pass had no bias."""
    n, rstd, scale, has_bias = cache
    rows = tuple(range(d_y.ndim - 1))
    d_n = d_y * scale
    mean_d = jnp.mean(d_n, axis=-1, keepdims=True)
    mean_dn = jnp.mean(d_n * n, axis=-1, keepdims=True)
    d_x = rstd * (d_n - mean_d - n * mean_dn)
    d_scale = jnp.sum(d_y * n, axis=rows)
    d_bias = jnp.sum(d_y, axis=rows) if has_bias else None
    return d_x, d_scale, d_bias


def rmsnorm_forward(
    x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float = RMSNORM_EPS
) -> tuple[Float[Array, "*rows D"], tuple]:
    """y = scale x / sqrt(mean(x^2) + eps), over the last axis."""
    rrms = lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)
    n = x * rrms
    return n * scale, (n, rrms, scale)


def rmsnorm_backward(d_y: Float[Array, "*rows D"], cache: tuple) -> tuple[Float[Array, "*rows D"], Float[Array, " D"]]:
    """(d_x, d_scale)."""
    n, rrms, scale = cache
    d_n = d_y * scale
    d_x = rrms * (d_n - n * jnp.mean(d_n * n, axis=-1, keepdims=True))
    d_scale = jnp.sum(d_y * n, axis=tuple(range(d_y.ndim - 1)))
    return d_x, d_scale
