"""Checks of chapter 19: collectives and their adjoints."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from foundation import collectives
from foundation.checks.inputs import Draws, filled_with
from foundation.parity import AnyCheck, Check, OracleCheck

RANKS = 3


def collective_checks() -> Iterator[AnyCheck]:
    """Each adjoint three ways, the ring against a sum, and experts on many ranks against experts on one."""
    draws = Draws("collectives")
    for name, shape in (
        ("all_reduce", (RANKS, 4)),
        ("all_gather", (RANKS, 2)),
        ("reduce_scatter", (RANKS, 2 * RANKS)),
        ("all_to_all", (RANKS, RANKS, 2)),
    ):
        forward, backward = getattr(collectives, f"{name}_forward"), getattr(collectives, f"{name}_backward")
        yield Check(name, "3 ranks", forward, backward, (draws.normal(*shape),))
        yield OracleCheck(name, "by messages", lambda x, f=forward: f(x)[0], MESSAGES[name], (draws.normal(*shape),))
    copied = filled_with(collectives.copy_to_all_forward, RANKS)
    yield Check("copy_to_all", "3 ranks", copied, collectives.copy_to_all_backward, (draws.normal(2, 2),))
    for ranks in (2, 5):
        yield OracleCheck(
            "ring_all_reduce", f"{ranks} ranks", collectives.ring_all_reduce, summed, (draws.normal(ranks, 3 * ranks),)
        )
    networks = draws.normal(4, 5), draws.normal(RANKS, 5, 2), draws.normal(RANKS, 2, 5)
    forward, backward = collectives.tensor_parallel_forward, collectives.tensor_parallel_backward
    yield Check("tensor_parallel", "3 ranks", forward, backward, networks)
    yield OracleCheck("tensor_parallel", "on one rank", lambda *a: forward(*a)[0], unsplit, networks)
    inputs = draws.normal(RANKS, 4, 6), draws.normal(RANKS, 10)
    yield Check("sharded", "3 ranks", collectives.sharded_forward, collectives.sharded_backward, inputs)
    yield OracleCheck("sharded", "on one rank", lambda *a: collectives.sharded_forward(*a)[0], gathered, inputs)
    for name, room in (("room for all", 4), ("full experts", 1)):
        place = slots(draws.generator.integers(0, RANKS, (RANKS, 4)), room)
        inputs = (draws.normal(RANKS, 4, 2), draws.normal(RANKS, 4), draws.normal(RANKS, 2, 2))
        forward = filled_with(collectives.expert_parallel_forward, place)
        yield Check("expert_parallel", name, forward, collectives.expert_parallel_backward, inputs)
        yield OracleCheck(
            "expert_parallel",
            f"{name}, on one rank",
            lambda *a, f=forward: f(*a)[0],
            partial(on_one_rank, place=place),
            inputs,
        )


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


PAIRS = [(r, s) for r in range(RANKS) for s in range(RANKS)]


def _reduced(x: Any) -> np.ndarray:
    return messages(x, x.shape, [((s,), (r,)) for r, s in PAIRS])


def _gathered(x: Any) -> np.ndarray:
    n = x.shape[1]
    return messages(x, (RANKS, RANKS * n), [((s, i), (r, s * n + i)) for r, s in PAIRS for i in range(n)])


def _scattered(x: Any) -> np.ndarray:
    n = x.shape[1] // RANKS
    return messages(x, (RANKS, n), [((s, r * n + i), (r, i)) for r, s in PAIRS for i in range(n)])


def _exchanged(x: Any) -> np.ndarray:
    return messages(x, x.shape, [((s, r), (r, s)) for r, s in PAIRS])


MESSAGES = {
    "all_reduce": _reduced,
    "all_gather": _gathered,
    "reduce_scatter": _scattered,
    "all_to_all": _exchanged,
}
"""Each collective as a list of messages."""


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
