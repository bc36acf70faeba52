"""The training loss, and the metrics of a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import TrainConfig
from moe_jax.data.batches import MaskedBatch
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy
from moe_jax.model.moe.layer import Mode, RouterStats
from moe_jax.model.quantized import QuantizedMatrix
from moe_jax.model.transformer import Transformer


class Metrics(NamedTuple):
    """The metrics of a training step. `loss` never includes the auxiliary losses."""

    loss: Float[Array, ""]
    """Mean cross-entropy, nats per predicted token. Of conversations, nats per token of the answers; 0 without any."""
    balance_loss: Float[Array, ""]
    """Without its coefficient, mean over the layers. 1 if all experts have the same load."""
    z_loss: Float[Array, ""]
    """Without its coefficient, mean over the layers and tokens of logsumexp(router logits)^2."""
    drop_fraction: Float[Array, ""]
    """Share of the pairs of a token and a chosen expert that had no slot, mean over the layers."""
    load: Float[Array, "L E"]
    """Share of a layer's pairs that each expert was chosen for, before drops. A row sums to 1."""
    answers: Float[Array, ""] | None = None
    """Tokens of the answers in a micro-batch (the mean over the micro-batches of a step). None for plain text."""


def auxiliary(
    stats: RouterStats | None, aux_loss_coef: float, z_loss_coef: float, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, ...]]:
    """The weighted auxiliary loss, a mean over layers, and (balance, z, drop fraction, load) for the metrics."""
    if stats is None:
        zero = jnp.zeros((), dtype)
        return zero, (zero, zero, zero, jnp.zeros((0, 0), dtype))
    balance, z = stats.balance_loss.mean(), stats.z_loss.mean()
    return aux_loss_coef * balance + z_loss_coef * z, (
        balance,
        z,
        stats.drop_fraction.mean(),
        stats.load,
    )


def training_loss(
    model: Transformer,
    tokens: Int[Array, "B T_plus_1"] | MaskedBatch,
    key: Key[Array, "..."] | None,
    config: TrainConfig,
    loss_scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss to minimise (mean cross-entropy plus the weighted auxiliary losses), and the metrics.

    A key, or one key for each sequence, turns on dropout.

    `loss_scale` is the factor by which the caller multiplies the loss (see `mean_cross_entropy`). The loss that is
    returned is not multiplied.

    With a `MaskedBatch` (here tokens `[B, T+1]` and weights `[B, T]`) the cross-entropy is the weighted sum.
    """
    weights = answers = None
    if isinstance(tokens, MaskedBatch):
        tokens, weights = jnp.asarray(tokens.tokens), jnp.asarray(tokens.weights).reshape(-1)
        answers = (weights > 0).sum().astype(weights.dtype)
    hidden, stats, _ = model(tokens[:, :-1], Mode.TRAIN, key)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    with jax.named_scope("head"):
        targets = tokens[:, 1:].reshape(-1)
        head = model.head_matrix()
        assert not isinstance(head, QuantizedMatrix), "quantised weights are not trained"
        loss = mean_cross_entropy(hidden, head, targets, loss_scale, weights)
    aux_loss_coef = config.aux_loss_coef if model.config.routing.balancing == "loss" else 0.0
    extra, reported = auxiliary(stats, aux_loss_coef, config.z_loss_coef, loss.dtype)
    return loss + extra, Metrics(loss, *reported, answers=answers)
