"""What the loop counts, by hand: evaluations without improvement, starved experts, drops."""

import json

import numpy as np
import pytest

from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.training.state import STARVED_STEPS, RunCounters


def test_evaluations_without_improvement() -> None:
    progress = RunCounters()
    assert [progress.add_evaluation(step, loss) for step, loss in enumerate([3.0, 2.0, 2.0, float("nan"), 1.0], 1)] == [
        *(True, True, False, False, True)
    ]
    assert (progress.best, progress.without_improvement, progress.evaluated) == (1.0, 0, 5)


def test_an_expert_is_starved_after_a_hundred_steps_in_a_row() -> None:
    """Of four experts the third of layer 1 gets 1 % of the pairs, where 25 % is fair; one fair step begins anew."""
    progress = RunCounters()
    fair, starving = np.full((2, 4), 0.25), np.array([[0.25] * 4, [0.49, 0.25, 0.01, 0.25]])
    for _ in range(STARVED_STEPS - 1):
        assert progress.add_step(starving, 0.0, True) == []
    assert progress.add_step(fair, 0.0, True) == []
    said = [progress.add_step(starving, 0.0, True) for _ in range(STARVED_STEPS + 5)]
    assert said == [[]] * (STARVED_STEPS - 1) + [[(1, 2)]] + [[]] * 5  # said once
    assert progress.starved_now() == [[1, 2]]
    assert progress.add_step(fair, 0.0, True) == []
    assert progress.starved_now() == []


def test_through_json() -> None:
    progress = RunCounters(best=0.1 + 0.2, without_improvement=2, evaluated=40, starved=[[0, 3], [99, 100]])
    assert RunCounters.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    for values in (None, progress.to_json() | {"more": 1}):
        with pytest.raises(CheckpointCorrupted, match="progress"):
            RunCounters.from_json(values)


def test_drops_are_counted_and_come_back_exactly() -> None:
    """Fractions that no float32 sum would keep: their mean, before and after a resume."""
    whole, half = RunCounters(), RunCounters()
    fractions = [0.1, 0.5, 1 / 3, 0.2]
    for n, fraction in enumerate(fractions):
        for counters in (whole, half):
            counters.add_step(np.zeros((0, 0)), fraction, True)
        if n == 1:
            half = RunCounters.from_json(json.loads(json.dumps(half.to_json())))
    assert half == whole
    assert whole.mean_drop == sum(fractions) / 4
    whole.add_step(np.zeros((0, 0)), 1.0, False)  # was not finite: it does not count
    assert (whole.mean_drop, whole.skipped_in_a_row) == (sum(fractions) / 4, 1)
