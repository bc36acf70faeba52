"""Are n micro-batches one batch? Derived in chapter 13.

The accumulated gradient is that of the whole batch where the *loss* of the whole batch is the sum of what the
micro-batches add up.

    a mean over n tokens        L = sum_i (n_i / n) L_i, so d_z in micro-batch i = (n_i / n) d_L (p - onehot) / n_i
    a mean over sequences       the mean of means, where all have equally many: the balance loss of this project
    a product of means          mean_b F_b P_b = Fbar Pbar + cov_b(F, P): the balance loss of f and P over a batch is
                                not the loss of its parts, and no weights repair this

Sources: Fedus et al. 2021, equations 4 to 6 (the balance loss); the faults in the field: torchtune #1875, transformers
#34191 and #35203.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foundation.losses import IGNORE, cross_entropy_backward, cross_entropy_forward

Scalar = Float[Array, ""]


class AccumulatedCache(NamedTuple):
    """The cache of each micro-batch's loss, and its share of the counted tokens."""

    parts: tuple[tuple, ...]
    shares: Array


def accumulated_loss_forward(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], parts: int
) -> tuple[Scalar, AccumulatedCache]:
    """Mean cross-entropy over the counted tokens of the batch, from `parts` micro-batches, one after another.

    Raises ValueError where the sequences cannot be divided among the micro-batches.
    """
    if len(logits) % parts:
        raise ValueError(f"{len(logits)} sequences cannot be divided among {parts} micro-batches")
    losses, caches, counts = [], [], []
    for z, wanted in zip(jnp.split(logits, parts), jnp.split(targets, parts), strict=True):
        loss, cache = cross_entropy_forward(z, wanted)
        losses.append(loss)
        caches.append(cache)
        counts.append(jnp.sum(wanted != IGNORE))
    count = jnp.stack(counts)
    shares = count / jnp.maximum(jnp.sum(count), 1)
    return jnp.sum(shares * jnp.stack(losses)), AccumulatedCache(tuple(caches), shares)


def accumulated_loss_backward(d_loss: Scalar, cache: AccumulatedCache) -> Float[Array, "B T V"]:
    """d_logits: each micro-batch's own gradient, times its share."""
    gradients = [
        cross_entropy_backward(d_loss * share, part) for share, part in zip(cache.shares, cache.parts, strict=True)
    ]
    return jnp.concatenate(gradients)


class BalanceCache(NamedTuple):
    """f of each group, [G, E], and the shape of the probabilities."""

    share: Array
    shape: tuple[int, ...]


def grouped_balance_forward(
    probs: Float[Array, "B T E"], chosen: Int[Array, "B T K"], groups: int
) -> tuple[Scalar, BalanceCache]:
    """The balance loss with f and P over each of `groups` equal groups of sequences, then the mean over groups.

    As many groups as sequences: the loss of this project. One group: f and P of the whole batch.
    """
    experts = probs.shape[-1]
    onehot = chosen[..., None] == jnp.arange(experts)  # [B, T, K, E]
    share = jnp.mean(onehot.reshape(groups, -1, experts), axis=1, dtype=probs.dtype)
    mean_prob = jnp.mean(probs.reshape(groups, -1, experts), axis=1)
    return experts * jnp.mean(jnp.sum(share * mean_prob, axis=-1)), BalanceCache(share, probs.shape)


def grouped_balance_backward(d_loss: Scalar, cache: BalanceCache) -> Float[Array, "B T E"]:
    """d_probs: E f_e / (tokens of all groups), with the f of the token's own group."""
    batch, tokens, experts = cache.shape
    groups = len(cache.share)
    d_group = d_loss * experts * cache.share / (batch * tokens)  # [G, E]
    return jnp.repeat(d_group, batch // groups, axis=0)[:, None] * jnp.ones((1, tokens, 1), d_group.dtype)


def balance_gap(probs: Float[Array, "B T E"], chosen: Int[Array, "B T K"], parts: int) -> Scalar:
    """How far the mean of the micro-batches' balance losses, each over its own micro-batch, is above that of the whole
    batch."""
    of_parts, _ = grouped_balance_forward(probs, chosen, parts)
    of_whole, _ = grouped_balance_forward(probs, chosen, 1)
    return of_parts - of_whole
