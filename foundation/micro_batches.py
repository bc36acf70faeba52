"""Are n micro-batches one batch? Derived in chapter 13.

    a mean over n tokens        L = sum_i (n_i / n) L_i, so d_z in micro-batch i = (n_i / n) d_L (p - onehot) / n_i
    a mean over sequences       the mean of means, where all have equally many: the balance loss of this project
    a product of means          mean_b F_b P_b = Fbar Pbar + cov_b(F, P): the balance loss of f and P over a batch is
                                not the loss of its parts, and no weights repair this

Sources: Fedus et al. 2021, equations 4 to 6 (the balance loss); the faults in the field: torchtune #1875, transformers
#34191 and #35203.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foundation.losses import IGNORE, cross_entropy_backward, cross_entropy_forward

Scalar = Float[Array, ""]


def accumulated_loss_forward(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], parts: int
) -> tuple[Scalar, tuple]:
    """Mean cross-entropy over the counted tokens of the batch, from `parts` micro-batches, one after another."""
    losses, caches, counts = [], [], []
    for z, wanted in zip(jnp.split(logits, parts), jnp.split(targets, parts), strict=True):
        loss, cache = cross_entropy_forward(z, wanted)
        losses.append(loss)
        caches.append(cache)
        counts.append(jnp.sum(wanted != IGNORE))
    count = jnp.stack(counts)
    shares = count / jnp.maximum(jnp.sum(count), 1)
    return jnp.sum(shares * jnp.stack(losses)), (caches, shares)


def accumulated_loss_backward(d_loss: Scalar, cache: tuple) -> Float[Array, "B T V"]:
    """d_logits: each micro-batch's own gradient, times its share."""
    caches, shares = cache
    return jnp.concatenate([cross_entropy_backward(d_loss * s, c) for s, c in zip(shares, caches, strict=True)])


def grouped_balance_forward(
    probs: Float[Array, "B T E"], chosen: Int[Array, "B T K"], groups: int
) -> tuple[Scalar, tuple]:
    """The balance loss with f and P over each of `groups` equal groups of sequences, then the mean over groups.

    As many groups as sequences: the loss of this project. One group: f and P of the whole batch.
    """
    experts = probs.shape[-1]
    onehot = chosen[..., None] == jnp.arange(experts)  # [B, T, K, E]
    share = jnp.mean(onehot.reshape(groups, -1, experts), axis=1, dtype=probs.dtype)
    mean_prob = jnp.mean(probs.reshape(groups, -1, experts), axis=1)
    return experts * jnp.mean(jnp.sum(share * mean_prob, axis=-1)), (share, probs.shape)


def grouped_balance_backward(d_loss: Scalar, cache: tuple) -> Float[Array, "B T E"]:
    """d_probs: E f_e / (tokens of all groups), with the f of the token's own group."""
    share, (batch, tokens, experts) = cache
    d_group = d_loss * experts * share / (batch * tokens)  # [G, E]
    return jnp.broadcast_to(jnp.repeat(d_group, batch // len(share), axis=0)[:, None], (batch, tokens, experts))


def balance_gap(probs: Float[Array, "B T E"], chosen: Int[Array, "B T K"], parts: int) -> Scalar:
    """How far the mean of the micro-batches' balance losses, each over its own micro-batch, is above that of the whole
    batch."""
    of_parts, _ = grouped_balance_forward(probs, chosen, parts)
    of_whole, _ = grouped_balance_forward(probs, chosen, 1)
    return of_parts - of_whole
