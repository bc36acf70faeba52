"""What the loop counts, by hand: evaluations without improvement, starved experts, loss spikes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import TrainConfig
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.state import SPIKE_AFTER, STARVED_STEPS, LossTrack, RunCounters, initial_state, next_track
from moe_jax.training.step import make_step
from tests.support import tiny


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


def test_the_track_by_hand() -> None:
    """The mean and the variance of the first losses are the plain ones; the limit is 6 standard deviations above."""
    track = LossTrack(jnp.zeros(()), jnp.zeros(()), jnp.int32(0))
    losses = np.random.default_rng(0).normal(3, 0.5, SPIKE_AFTER).astype(np.float32)
    for i, loss in enumerate(losses):
        assert float(track.limit()) == np.inf, i
        track = next_track(track, jnp.float32(loss), jnp.bool_(True))
    np.testing.assert_allclose([float(track.mean), float(track.variance)], [losses.mean(), losses.var()], rtol=1e-4)
    assert float(track.limit()) == pytest.approx(losses.mean() + 6 * losses.std(), rel=1e-4)
    tiny.assert_same_bits(next_track(track, jnp.float32(np.nan), jnp.bool_(False)), track)


def test_a_spike_is_seen_and_not_skipped() -> None:
    """A loss of about ln 13 where 0.1 was usual."""
    config = TrainConfig(steps=10)
    graphdef, params = tiny.build(tiny.config(layers=1, width=16, capacity_factor=2.0))
    optimizer = make_optimizer(config)
    state = initial_state(jax.tree.map(jnp.array, params), optimizer, False)
    usual = LossTrack(jnp.float32(0.1), jnp.float32(0.01), jnp.int32(SPIKE_AFTER))
    state = dataclasses.replace(state, loss_track=usual)
    state, report = make_step(graphdef, optimizer, config, False)(state, tiny.tokens(1, 2, tiny.T + 1, seed=3))
    assert (bool(report.finite), bool(report.spike), int(state.skipped), int(state.step)) == (True, True, 0, 1)
