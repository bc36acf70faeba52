"""Checks of chapter 6: normalisations, lookups, and positions."""

from collections.abc import Iterator

import numpy as np

from foundation import embedding, grouped_heads, norms, positions
from foundation.checks.inputs import Draws, answer, gradient
from foundation.parity import AnyCheck


def checks() -> Iterator[AnyCheck]:
    """Norms at rows whose variance is as small as eps; lookups of repeated and of unused rows; rotations."""
    for case, shape, std in (("rows", (2, 3, 5), 1.0), ("one row", (4,), 1.0), ("variance near eps", (3, 5), 3e-3)):
        draws = Draws(f"norms/{case}")
        x, scale, bias = draws.normal(*shape, std=std), draws.normal(shape[-1]), draws.normal(shape[-1])
        yield gradient(norms.layernorm_forward, case, (x, scale, bias))
        yield gradient(norms.rmsnorm_forward, case, (x, scale))
    draws = Draws("norms/no bias")
    yield gradient(norms.layernorm_forward, "no bias, mean of 4", (draws.normal(3, 5) + 4.0, draws.normal(5), None))
    for case, length, std in (("each head", 4, 1.0), ("all heads together", 8, 1.0), ("squares near eps", 8, 3e-3)):
        inputs = (draws.normal(2, 3, 8, std=std), draws.normal(length))
        yield gradient(grouped_heads.normalise_heads_forward, case, inputs)
    draws = Draws("embedding and positions")
    table = draws.normal(7, 4)
    repeated = np.array([[1, 1, 4], [1, 0, 6]])
    yield gradient(embedding.embedding_forward, "repeated and unused rows", (table,), repeated)
    yield gradient(embedding.embedding_forward, "one token", (table,), np.array([[2]]))
    yield gradient(embedding.tied_head_forward, "batch", (draws.normal(2, 3, 4), table))
    for case, length in (("shorter than the table", 3), ("as long as the table", 5)):
        yield gradient(positions.learned_positions_forward, case, (draws.normal(2, length, 4), draws.normal(5, 4)))
    for case, shape in (("heads", (2, 2, 5, 4)), ("one position", (1, 6)), ("one pair", (7, 2))):
        yield gradient(positions.rope_forward, case, (draws.normal(*shape),))
    slowed = positions.slowed_pairs(8, 4.0, 16, 50.0)
    yield gradient(positions.rope_forward, "slow pairs slowed", (draws.normal(5, 8),), 50.0, slowed)
    for case, constants in (("base 10,000", (16, 8.0, 512)), ("base 50", (8, 4.0, 16, 50.0))):
        yield answer(positions.slowed_pairs, case, pair_by_pair, (), *constants)


def pair_by_pair(width: int, factor: float, trained: int, base: float = positions.ROPE_BASE) -> np.ndarray:
    """Each pair by itself: the positions of one whole turn, its wave length, against the trained length."""
    slowed = []
    for pair in range(width // 2):
        wave = 2.0 * np.pi * base ** (2 * pair / width)
        if wave < trained / 4.0:
            slowed.append(1.0)
        elif wave > trained:
            slowed.append(1.0 / factor)
        else:
            smooth = (trained / wave - 1.0) / 3.0
            slowed.append(smooth + (1.0 - smooth) / factor)
    return np.array(slowed)
