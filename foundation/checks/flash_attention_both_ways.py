"""Checks of chapter 11: attention in tiles."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from foundation import flash_attention as flash
from foundation.checks.inputs import Draws, answer, gradient
from foundation.parity import AnyCheck


def checks() -> Iterator[AnyCheck]:
    """The merge against long arithmetic and against one softmax; tiles of 2 and of 3 of 5 keys, with dropout."""
    draws = Draws("merge_parts")
    ordinary, other = ([draws.normal(5), 0.5 + draws.normal(5) ** 2, draws.normal(5, 3)] for _ in range(2))
    nothing = [np.full(5, -np.inf), np.zeros(5), np.zeros((5, 3))]
    for case, first, second in (
        ("two parts", ordinary, other),
        ("scores beyond e^709", [ordinary[0] + 2000.0, *ordinary[1:]], [other[0] + 1999.0, *other[1:]]),
        ("nothing, then a part", nothing, ordinary),
        ("a part, then nothing", ordinary, nothing),
    ):
        yield answer(flash.merge_parts, case, unshifted, (*first, *second))
    scores_and_v = 3.0 * draws.normal(4, 6), draws.normal(6, 2)
    left_to_right, any_order = ((0, 1), (2, 3, 4), (5,)), ((5, 2), (0,), (4, 1, 3))
    yield answer(flash.merged_output, "from left to right", one_softmax, scores_and_v, left_to_right)
    yield answer(flash.merged_output, "in any order", one_softmax, scores_and_v, any_order)
    for tile, causal, case in ((2, True, "tiles of 2, causal, dropout"), (3, False, "tiles of 3, no mask")):
        draws = Draws(f"flash_attention/{case}")
        qkv, keep = tuple(draws.normal(3, 2, 5, 3)), draws.keep(2, 5, 5) if causal else None
        yield gradient(flash.flash_attention_forward, case, qkv, keep, 0.25, causal, tile)


def unshifted(*parts: Any) -> tuple:
    """The same in numbers of 80 bits, which hold e^2000: no piece is shifted before the sum."""
    m1, l1, o1, m2, l2, o2 = (np.asarray(part, np.longdouble) for part in parts)
    largest = np.maximum(m1, m2)
    totals, outputs = (
        np.exp(m1).reshape(-1, *(1,) * (a.ndim - 1)) * a + np.exp(m2).reshape(-1, *(1,) * (a.ndim - 1)) * b
        for a, b in ((l1, l2), (o1, o2))
    )
    scale = np.exp(-largest)
    return tuple(np.asarray(x, np.float64) for x in (largest, totals * scale, outputs * scale[:, None]))


def one_softmax(scores: Any, v: Any, pieces: Any) -> np.ndarray:
    """All keys at once."""
    weights = np.exp(np.asarray(scores) - np.max(scores, axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ np.asarray(v)
