"""Timing that can be trusted on a machine that others use too.

A shared machine drifts by a factor of two within minutes, so two times compare only if they were taken side by side:
`alternate` runs all candidates in turn, again and again, and compares medians. Every run is waited for.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Times(NamedTuple):
    """Seconds of one candidate, over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """The middle half of the times over their median: 0.1 says that half of them lie within 10 % of each other."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median)


class Measured(float):
    """What a candidate returns that has measured its own seconds, in another process."""


def alternate(
    candidates: dict[str, Callable[[], Any]], rounds: int, warmups: int = 2, rest: float = 0.0, turn: float = 0.0
) -> dict[str, Times]:
    """Run each candidate once a round, `rounds` times, after `warmups` rounds that do not count.

    Where processes take turns, each begins after `rest` seconds, in which the other's threads stop waiting for work,
    and lasts for `turn` seconds, of whose runs the median counts: processors that have slept are slow at first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for n in range(warmups + rounds):
        for name, run in candidates.items():
            time.sleep(rest)
            taken = _turn(run, turn)
            if n >= warmups:
                seconds[name].append(taken)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def _turn(run: Callable[[], Any], least: float) -> float:
    """The median seconds of at least one run, and of more until `least` seconds are over."""
    taken: list[float] = []
    end = time.perf_counter() + least
    while not taken or time.perf_counter() < end:
        begin = time.perf_counter()
        result = jax.block_until_ready(run())
        elapsed = time.perf_counter() - begin
        taken.append(float(result) if isinstance(result, Measured) else elapsed)
    return float(np.median(taken))


def recycled(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    """`function(*operands)` as a call without arguments that gives each result's memory to the next call.

    A training step writes its gradients where the last ones were. Fresh memory for every call would be timed as
    page faults, which are a third of such a step on a CPU.
    """
    run = jax.jit(lambda old, *a: function(*a), donate_argnums=0, keep_unused=True)
    held = [jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), jax.eval_shape(function, *operands))]

    def call() -> Any:
        held[0] = run(held[0], *operands)
        return held[0]

    return call
