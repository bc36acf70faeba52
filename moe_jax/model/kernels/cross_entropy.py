"""Cross-entropy, one block of tokens after another, so that the whole array of logits `[N, V]` never exists."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.matmul import transpose_contiguous
from moe_jax.model.precision import at_least_float32

Implementation = Literal["blocked", "reference"]

LOGITS_BYTES = 32 * 2**20
"""Most bytes that the float32 logits of one block may take. Their gradient takes the same number again."""


def token_losses(logits: Float[Array, "*N V"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """-log softmax(logits)[target], in nats."""
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def blocked_token_losses(
    hidden: Float[Array, "N D"], head: Float[Array, "D V"], targets: Int[Array, " N"]
) -> Float[Array, " N"]:
    """`token_losses(hidden @ head, targets)`, a block of tokens at a time. For evaluation: it has no gradient."""
    weight = head.astype(hidden.dtype)
    wide = at_least_float32(hidden.dtype)

    def block(inputs: tuple[Array, Array]) -> Array:
        return token_losses(jnp.matmul(inputs[0], weight, preferred_element_type=wide), inputs[1])

    n = _blocks(hidden.shape[0], head.shape[1])
    return jax.lax.map(block, (hidden.reshape(n, -1, hidden.shape[1]), targets.reshape(n, -1))).reshape(-1)


def mean_cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    implementation: Implementation = "blocked",
) -> Float[Array, ""]:
    """Mean of `token_losses(hidden @ head, targets)`.

    blocked     one block of tokens after another, with gradients written by hand
    reference   all logits at once, differentiated by jax; the tests compare `blocked` with it
    """
    if implementation == "reference":
        wide = at_least_float32(hidden.dtype)
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=wide)
        return token_losses(logits, targets).mean()
    return _blocked_mean(hidden, head, targets)


def _blocks(tokens: int, vocabulary: int) -> int:
    """The number of equal blocks of tokens: the smallest number whose blocks have at most LOGITS_BYTES of logits."""
    fits = (n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n * vocabulary * 4 <= LOGITS_BYTES)
    return next(fits, tokens)


@jax.custom_vjp
def _blocked_mean(
    hidden: Float[Array, "N D"], head: Float[Array, "D V"], targets: Int[Array, " N"]
) -> Float[Array, ""]:
    """With L = mean_n(logsumexp(z_n) - z_n[target]) and z = hidden head:

        dL/dz = (softmax(z) - onehot(target)) / N,   d_hidden = dL/dz head^T,   d_head = hidden^T dL/dz

    The loss is a scalar, so the forward pass knows d_hidden and d_head up to one factor: the incoming gradient of the
    loss, divided by N. The forward pass computes them block by block, while it has the logits z of the block. The
    backward pass only multiplies by the factor. No logits are kept.
    """
    return _cross_entropy(hidden, head, targets, with_gradients=False)[0]


def _cross_entropy(hidden: Array, head: Array, targets: Array, with_gradients: bool) -> tuple[Array, Array, Array]:
    count, vocabulary = hidden.shape[0], head.shape[1]
    wide = at_least_float32(hidden.dtype)
    weight = head.astype(hidden.dtype)

    def block(d_head: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        h, target = inputs
        z = jnp.matmul(h, weight, preferred_element_type=wide)
        loss = token_losses(z, target).sum()
        if not with_gradients:
            return d_head, (loss, jnp.zeros((0, h.shape[1]), h.dtype))
        d_z = (jax.nn.softmax(z, axis=-1) - jax.nn.one_hot(target, vocabulary, dtype=wide)).astype(h.dtype)
        d_head = d_head + jnp.matmul(transpose_contiguous(h), d_z, preferred_element_type=wide)
        return d_head, (loss, jnp.einsum("nv,dv->nd", d_z, weight))

    n = _blocks(count, vocabulary)
    d_head = jnp.zeros(head.shape if with_gradients else (), wide)
    inputs = (hidden.reshape(n, count // n, -1), targets.reshape(n, -1))
    if n == 1:
        d_head, (losses, d_hidden) = block(d_head, (inputs[0][0], inputs[1][0]))
    else:
        d_head, (losses, d_hidden) = jax.lax.scan(block, d_head, inputs)
    return losses.sum() / count, d_hidden.reshape(-1, hidden.shape[1]), d_head


def _forward(hidden: Array, head: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    loss, d_hidden, d_head = _cross_entropy(hidden, head, targets, with_gradients=True)
    return loss, (d_hidden, d_head.astype(head.dtype), jnp.asarray(1 / hidden.shape[0], loss.dtype))


def _backward(residuals: tuple[Array, Array, Array], d_loss: Array) -> tuple[Array, Array, None]:
    d_hidden, d_head, share = residuals
    scale = d_loss * share
    return (d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None)


_blocked_mean.defvjp(_forward, _backward)
