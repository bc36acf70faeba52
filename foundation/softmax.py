"""Softmax and logsumexp. Derived in chapter 4.

    p_i = exp(z_i) / sum_j exp(z_j)        J = diag(p) - p p^T        d_z = p * (d_p - <p, d_p>)
    l = log sum_j exp(z_j)                 dl/dz = p

The largest logit is subtracted first, for range only: it cancels in the quotient.

Source: Bridle 1990, "Training stochastic model recognition algorithms", section 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def softmax_forward(
    logits: Float[Array, "*rows N"], mask: Bool[Array, "..."] | None = None
) -> tuple[Float[Array, "*rows N"], tuple]:
    """p = softmax over the last axis where `mask` (broadcast to the logits) is True, 0 elsewhere. A row that is masked
    whole gives zeros, not NaN."""
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # -inf - (-inf) is NaN: a row that is masked whole is shifted by 0 instead.
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p = weights / jnp.where(total == 0.0, 1.0, total)
    return p, (p,)


def softmax_backward(d_p: Float[Array, "*rows N"], cache: tuple) -> Float[Array, "*rows N"]:
    """d_logits = p (d_p - <p, d_p>). A masked entry has p = 0, so it gets exactly 0."""
    (p,) = cache
    return p * (d_p - jnp.sum(p * d_p, axis=-1, keepdims=True))


def logsumexp_forward(logits: Float[Array, "*rows N"]) -> tuple[Float[Array, "*rows"], tuple]:
    """l = log sum_j exp(z_j), shifted by the largest logit so that exp cannot overflow."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = jnp.exp(logits - largest)
    total = jnp.sum(shifted, axis=-1, keepdims=True)
    return (jnp.log(total) + largest)[..., 0], (shifted / total,)


def logsumexp_backward(d_l: Float[Array, "*rows"], cache: tuple) -> Float[Array, "*rows N"]:
    """dl/dz_i = exp(z_i) / S = p_i: the gradient of logsumexp is the softmax."""
    (p,) = cache
    return d_l[..., None] * p
