"""Checks of chapter 19: collectives and their adjoints."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from foundation import collectives
from foundation.checks.inputs import Draws, answer, gradient
from foundation.parity import AnyCheck

RANKS = 3


def checks() -> Iterator[AnyCheck]:
    """Each adjoint three ways, the ring against a sum, and experts on many ranks against experts on one."""
    draws = Draws("collectives")
    pairs = [(r, s) for r in range(RANKS) for s in range(RANKS)]
    for forward, shape, result, wires in (
        (collectives.all_reduce_forward, (RANKS, 4), (RANKS, 4), [((s,), (r,)) for r, s in pairs]),
        (
            collectives.all_gather_forward,
            (RANKS, 2),
            (RANKS, 2 * RANKS),
            [((s, i), (r, 2 * s + i)) for r, s in pairs for i in range(2)],
        ),
        (
            collectives.reduce_scatter_forward,
            (RANKS, 2 * RANKS),
            (RANKS, 2),
            [((s, 2 * r + i), (r, i)) for r, s in pairs for i in range(2)],
        ),
        (collectives.all_to_all_forward, (RANKS, RANKS, 2), (RANKS, RANKS, 2), [((s, r), (r, s)) for r, s in pairs]),
    ):
        yield gradient(forward, "3 ranks", (draws.normal(*shape),))
        by_messages = partial(messages, shape=result, wires=wires)
        yield answer(forward, "by messages", by_messages, (draws.normal(*shape),))
    yield gradient(collectives.copy_to_all_forward, "3 ranks", (draws.normal(2, 2),), RANKS)
    for ranks in (2, 5):
        yield answer(collectives.ring_all_reduce, f"{ranks} ranks", summed, (draws.normal(ranks, 3 * ranks),))
    networks = draws.normal(4, 5), draws.normal(RANKS, 5, 2), draws.normal(RANKS, 2, 5)
    shards = draws.normal(RANKS, 4, 6), draws.normal(RANKS, 10)
    for forward, oracle, inputs in (
        (collectives.tensor_parallel_forward, unsplit, networks),
        (collectives.sharded_forward, gathered, shards),
    ):
        yield gradient(forward, "3 ranks", inputs)
        yield answer(forward, "on one rank", oracle, inputs)
    for name, room in (("room for all", 4), ("full experts", 1)):
        place = slots(draws.generator.integers(0, RANKS, (RANKS, 4)), room)
        inputs = (draws.normal(RANKS, 4, 2), draws.normal(RANKS, 4), draws.normal(RANKS, 2, 2))
        yield gradient(collectives.expert_parallel_forward, name, inputs, place)
        yield answer(collectives.expert_parallel_forward, f"{name}, on one rank", on_one_rank, inputs, place)


def slots(expert: np.ndarray, room: int) -> np.ndarray:
    """place[r, t, e, c] for experts that give `room` slots to each rank, in the order of its tokens."""
    place = np.zeros((*expert.shape, RANKS, room), bool)
    for r, row in enumerate(expert):
        for t, e in enumerate(row):
            before = int(np.sum(row[:t] == e))
            if before < room:
                place[r, t, e, before] = True
    return place


def messages(x: Any, shape: tuple[int, ...], wires: list[tuple[tuple, tuple]]) -> np.ndarray:
    """Each (source, target) sends one number, or one part. What arrives at a place is added up there."""
    out = np.zeros(shape)
    for source, target in wires:
        out[target] += np.asarray(x)[source]
    return out


def summed(x: Any) -> tuple[np.ndarray, int]:
    """The sum, and what the ring's arithmetic says is sent: 2 (R - 1) / R of the array."""
    ranks, size = x.shape
    return np.tile(np.asarray(x).sum(0), (ranks, 1)), 2 * (ranks - 1) * size // ranks


def unsplit(x: Any, w_in: Any, w_out: Any) -> np.ndarray:
    """One network with all columns side by side."""
    return np.tanh(np.asarray(x) @ np.hstack(w_in)) @ np.vstack(w_out)


def gathered(x: Any, shards: Any) -> np.ndarray:
    """One matrix, and the rows of all ranks."""
    return np.asarray(x) @ np.asarray(shards).reshape(x.shape[-1], -1)


def on_one_rank(x: Any, gate: Any, weights: Any, place: Any) -> np.ndarray:
    """Token by token: its expert's matrix, where it has a slot."""
    x, gate, weights, place = map(np.asarray, (x, gate, weights, place))
    y = np.zeros_like(x)
    for r, t, e, _ in np.argwhere(place):
        y[r, t] = gate[r, t] * x[r, t] @ weights[e]
    return y
