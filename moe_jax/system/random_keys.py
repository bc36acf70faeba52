"""Random keys. Every key is made of the seed, a purpose, and a step.

So no two purposes share a key, and a resumed run draws the same numbers as an uninterrupted run.
"""

from enum import IntEnum

import jax
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


def purpose_key(seed: int, purpose: Purpose, step: int | Int[Array, ""] | None = None) -> Key[Array, ""]:
    """The key of a purpose, at a step if the purpose draws at every step."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    return key if step is None else jax.random.fold_in(key, step)
