"""Mean squared error, and cross-entropy of logits.

Cross-entropy of one position with target y:  L = -log p_y = logsumexp(z) - z_y. Each part has a one-line
gradient (`softmax.py`: that of logsumexp is p), and their difference is the best-known formula of the
field:

    dL/dz = p - onehot(y)

It is bounded by 1 in every entry, even where p_y underflows to 0. Going through p instead, -1/p_y times the
softmax Jacobian, is the same in exact arithmetic and 0/0 in a computer.

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
    """(d_prediction, d_target): 2 error / n, and its negative. The one division by n is here, and only
    here."""
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
