"""The training loss, and cross-entropy by blocks of tokens, so that `[B, T, V]` logits never exist at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import TrainConfig
from moe_jax.model.moe import LayerTrace, Mode, RouterStats
from moe_jax.model.precision import at_least_float32
from moe_jax.model.products import turned
from moe_jax.model.transformer import Transformer

LOGITS_BYTES = 32 * 2**20
"""Most bytes that the logits of one block may take; they live beside their gradient."""


class Metrics(NamedTuple):
    """What a training step reports. Auxiliary losses are never part of `loss`."""

    loss: Float[Array, ""]
    """Mean cross-entropy, nats per predicted token."""
    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    drop_fraction: Float[Array, ""]
    load: Float[Array, "L E"]
    trace: LayerTrace | None = None
    """Only of a traced step: every decision of the routers, with leading axes M (micro-batches) and L."""


def token_losses(logits: Float[Array, "*N V"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """-log softmax(logits)[target], in nats."""
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def _blocks(tokens: int, vocabulary: int) -> int:
    """Into how many equal blocks the tokens are cut: the fewest whose logits keep within LOGITS_BYTES each."""
    fits = (n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n * vocabulary * 4 <= LOGITS_BYTES)
    return next(fits, tokens)


def blocked_token_losses(
    hidden: Float[Array, "N D"], head: Float[Array, "D V"], targets: Int[Array, " N"]
) -> Float[Array, " N"]:
    """`token_losses(hidden @ head, targets)`, a block of tokens at a time. For evaluation: it has no gradient of its
    own."""
    weight = head.astype(hidden.dtype)
    wide = at_least_float32(hidden.dtype)

    def block(inputs: tuple[Array, Array]) -> Array:
        return token_losses(jnp.matmul(inputs[0], weight, preferred_element_type=wide), inputs[1])

    n = _blocks(hidden.shape[0], head.shape[1])
    return jax.lax.map(block, (hidden.reshape(n, -1, hidden.shape[1]), targets.reshape(n, -1))).reshape(-1)


@jax.custom_vjp
def mean_cross_entropy(
    hidden: Float[Array, "N D"], head: Float[Array, "D V"], targets: Int[Array, " N"]
) -> Float[Array, ""]:
    """Mean of `token_losses(hidden @ head, targets)`.

    With L = mean_n(logsumexp(z_n) - z_n[target]) and z = hidden head:

        dL/dz = (softmax(z) - onehot(target)) / N,   d_hidden = dL/dz head^T,   d_head = hidden^T dL/dz

    The loss is a scalar, so these are known up to one factor when the forward pass has z at hand: they are
    computed there, block by block. Nothing is recomputed in the backward pass, and no logits are kept.
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
        d_head = d_head + jnp.matmul(turned(h), d_z, preferred_element_type=wide)
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


mean_cross_entropy.defvjp(_forward, _backward)


def auxiliary(
    stats: RouterStats | None, balance_coef: float, z_coef: float, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, ...]]:
    """The weighted auxiliary loss, a mean over layers, and (balance, z, drop fraction, load) for the metrics."""
    if stats is None:
        zero = jnp.zeros((), dtype)
        return zero, (zero, zero, zero, jnp.zeros((0, 0), dtype))
    balance, z = stats.balance_loss.mean(), stats.z_loss.mean()
    return balance_coef * balance + z_coef * z, (
        balance,
        z,
        stats.drop_fraction.mean(),
        stats.load,
    )


def training_loss(
    model: Transformer,
    tokens: Int[Array, "B T_plus_1"],
    key: Key[Array, ""] | None,
    config: TrainConfig,
    trace: bool = False,
) -> tuple[Float[Array, ""], Metrics]:
    """What is minimised: mean cross-entropy plus the weighted auxiliary losses; and the metrics, with the routers'
    decisions where `trace`, which is static, asks for them. A key turns dropout on."""
    hidden, stats, _ = model(tokens[:, :-1], Mode.TRAIN, key, trace)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    with jax.named_scope("head"):
        loss = mean_cross_entropy(hidden, model.head_matrix(), tokens[:, 1:].reshape(-1))
    balance_coef = config.balance_coef if model.config.balancing == "loss" else 0.0
    extra, reported = auxiliary(stats, balance_coef, config.z_coef, loss.dtype)
    return loss + extra, Metrics(loss, *reported, trace=None if stats is None else stats.trace)
