"""Mean squared error, and cross-entropy of logits. Derived in chapters 2 and 4.

    L = mean of (prediction - target)^2        dL/d prediction = 2 (prediction - target) / n
    L = logsumexp(z) - z_y = -log p_y          dL/dz = p - onehot(y)

Going through p instead, -1/p_y times the softmax Jacobian, is 0/0 in a computer where p_y underflows.

Sources: Bridle 1990, section 3; Rumelhart, Hinton and Williams 1986, equation 3 (squared error).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foundation.softmax import logsumexp_backward, logsumexp_forward

IGNORE = -1
"""A target with this value is not predicted: it counts neither in the sum nor in the mean."""

Scalar = Float[Array, ""]


def mse_forward(prediction: Float[Array, "*shape"], target: Float[Array, "*shape"]) -> tuple[Scalar, tuple]:
    """L = mean over all entries of (prediction - target)^2."""
    error = prediction - target
    return jnp.mean(error**2), (error,)


def mse_backward(d_loss: Scalar, cache: tuple) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """(d_prediction, d_target): 2 error / n, and its negative."""
    (error,) = cache
    d_prediction = d_loss * 2.0 * error / error.size
    return d_prediction, -d_prediction


def cross_entropy_forward(logits: Float[Array, "*rows V"], targets: Int[Array, "*rows"]) -> tuple[Scalar, tuple]:
    """L = mean over the n counted positions of logsumexp(z) - z_target, in nats.

    Positions whose target is `IGNORE` are not counted. With none counted the loss is 0.
    """
    counted = targets != IGNORE
    safe_targets = jnp.where(counted, targets, 0)
    log_total, lse_cache = logsumexp_forward(logits)
    chosen = jnp.take_along_axis(logits, safe_targets[..., None], axis=-1)[..., 0]
    count = jnp.maximum(jnp.sum(counted), 1)
    loss = jnp.sum(jnp.where(counted, log_total - chosen, 0.0)) / count
    return loss, (lse_cache, safe_targets, counted, count)


def cross_entropy_backward(d_loss: Scalar, cache: tuple) -> Float[Array, "*rows V"]:
    """d_logits = (p - onehot(target)) / n at counted positions, exactly 0 at ignored ones."""
    lse_cache, targets, counted, count = cache
    d_row = jnp.where(counted, d_loss / count, 0.0)
    d_logits = logsumexp_backward(d_row, lse_cache)  # the p of p - onehot
    onehot = jnp.arange(d_logits.shape[-1]) == targets[..., None]
    return d_logits - jnp.where(onehot, d_row[..., None], 0.0)
