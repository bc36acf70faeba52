"""Timing on a machine that other programs use too.

The speed of a shared machine drifts by a factor of two within minutes. So times are comparable only if they were
measured side by side. `alternate` runs all candidates in turn, round after round, and takes medians. It waits for the
result of every run.
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
        """Interquartile range / median. 0.1: the middle half of the times spans 10 % of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median)


class Measured(float):
    """Seconds that a candidate has measured itself, for example in another process. Replaces the measured time."""


def alternate(
    candidates: dict[str, Callable[[], Any]], rounds: int, warmups: int = 2, rest: float = 0.0, turn: float = 0.0
) -> dict[str, Times]:
    """Time each candidate once a round, for `rounds` rounds after `warmups` rounds that do not count.

    `rest` and `turn` are for candidates that run in different processes. Before each turn there are `rest` seconds, in
    which the threads of the other process go to sleep. A candidate then runs again and again for `turn` seconds, and
    the median time counts, because a processor that has slept is slow at first.
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
    """The median seconds of repeated runs. Runs start until `least` seconds have passed; there is at least one."""
    taken: list[float] = []
    end = time.perf_counter() + least
    while not taken or time.perf_counter() < end:
        begin = time.perf_counter()
        result = jax.block_until_ready(run())
        elapsed = time.perf_counter() - begin
        taken.append(float(result) if isinstance(result, Measured) else elapsed)
    return float(np.median(taken))


def with_reused_output(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    """`function(*operands)` as a function without arguments. Each call writes its result into the memory of the
    previous result.

    A training step reuses memory in the same way. With new memory for every call, the time would include page faults:
    a third of the time of such a call on a CPU.
    """
    run = jax.jit(lambda old, *a: function(*a), donate_argnums=0, keep_unused=True)
    held = [jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), jax.eval_shape(function, *operands))]

    def call() -> Any:
        held[0] = run(held[0], *operands)
        return held[0]

    return call


def matmul_rate(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations per second of a square matrix product on the first device, in the fastest of `repeats`
    runs."""
    a = jax.numpy.ones((size, size), dtype)
    matmul = jax.jit(jax.numpy.matmul)
    matmul(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        matmul(a, a).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / float(np.min(seconds))
