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
    candidates: dict[str, Callable[[], Any]], rounds: int, warmups: int = 2, rest: float = 0.0
) -> dict[str, Times]:
    """Run each candidate once a round, `rounds` times, after `warmups` that do not count; each after `rest` seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for n in range(warmups + rounds):
        for name, run in candidates.items():
            time.sleep(rest)
            begin = time.perf_counter()
            result = jax.block_until_ready(run())
            elapsed = time.perf_counter() - begin
            if n >= warmups:
                seconds[name].append(float(result) if isinstance(result, Measured) else elapsed)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


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
