"""The queue of each expert: the order in which its (token, choice) pairs get its slots.

The order is *token-major*: earlier tokens first, then the choices of a token in order. No token can take a slot from an
earlier one, so the layer is causal at a fixed T (the capacity depends on T). `dispatch.Capacity` keeps a pair whose
place is below the capacity. The keep mask is an array of its own: a choice whose gate underflows to 0 still holds its
slot.

Chapter 12 of `foundation` derives which orders leak the future.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def choice_counts(expert: Int[Array, "B T K"], valid: Bool[Array, "B T"], experts: int) -> Int[Array, "B T E"]:
    """1 where a valid token chose the expert, else 0. The K choices of a token are distinct."""
    hits = jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2)
    return hits * valid[..., None]


def queue_positions(expert: Int[Array, "B T K"], valid: Bool[Array, "B T"], experts: int) -> Int[Array, "B T K"]:
    """The place of each pair in its expert's queue, from 0: the number of earlier tokens of the sequence that chose the
    expert.

    The K choices of a token are distinct, so the pairs of one token are in different queues. Therefore counting tokens
    gives the token-major order of pairs.
    """
    hits = choice_counts(expert, valid, experts)
    before = jnp.cumsum(hits, axis=1) - hits
    return jnp.take_along_axis(before, expert, axis=-1)
