"""Random keys. Every key is made of the seed, a purpose, and a step; a training step makes one key for each sequence.

So no two purposes share a key, and a resumed run draws the same numbers as an uninterrupted run. A sequence's numbers
depend on its place in the step's whole batch, and not on how the batch is cut into micro-batches.
"""

from enum import IntEnum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


class Purpose(IntEnum):
    """What a random number is for. Never change a number: a resumed run must draw the same numbers."""

    INITIAL_PARAMETERS = 0
    DROPOUT = 1
    """Dropout, and the routers' noise and jitter."""
    SAMPLE = 2
    """Tokens of generated text."""
    ROUND_MOMENTS = 3
    """Stochastic rounding of 8-bit moments."""
    ROUND_WEIGHTS = 4
    """Stochastic rounding of bfloat16 parameters."""
    ADAPTERS = 5
    """Initial values of low-rank adapters."""


type Number = int | Int[Array, ""]


def purpose_key(seed: Number, purpose: Purpose, step: Number | None = None) -> Key[Array, ""]:
    """The key of a purpose, at a step if the purpose draws at every step."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    return key if step is None else jax.random.fold_in(key, step)


def sequence_keys(key: Key[Array, "..."], count: int, first: int | Int[Array, ""] = 0) -> Key[Array, " B"]:
    """One key for each of the `count` sequences `first`, `first` + 1, ... of a batch: fold_in(key, sequence).

    An array of keys, one for each sequence, is returned as it is.
    """
    if key.ndim == 1:
        return key
    return jax.vmap(lambda sequence: jax.random.fold_in(key, sequence))(first + jnp.arange(count))


def fold_each(keys: Key[Array, " B"], number: int | Int[Array, ""]) -> Key[Array, " B"]:
    """fold_in(key, number) of each key."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def split_each(keys: Key[Array, " B"], count: int) -> Key[Array, "count B"]:
    """`count` new keys of each key."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
