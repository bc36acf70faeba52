"""The training step: what is averaged, scheduled, skipped and compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import TrainConfig
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.optimizer import learning_rate, make_optimizer, warmup_steps
from moe_jax.training.state import LossScale, initial_state
from moe_jax.training.step import gradients, make_step
from tests import tiny


@functools.lru_cache
def built(compute: str | None = None):
    return tiny.build(tiny.config(layers=1, width=16, capacity_factor=2.0), compute=compute)


def fresh(config: TrainConfig, loss_scaling: bool = False, compute: str | None = None):
    """A jitted step, and a state whose memory it may take over."""
    graphdef, params = built(compute)
    optimizer = make_optimizer(config)
    state = initial_state(jax.tree.map(jnp.array, params), optimizer, loss_scaling)
    return make_step(graphdef, optimizer, config, loss_scaling), state


def test_it_learns_one_batch_by_heart_in_one_compilation() -> None:
    """Also: the step counts, nothing is skipped, the loss falls below 0.05 nats of the ln 13 = 2.6 of a guess."""
    step, state = fresh(TrainConfig(steps=150, lr=2e-2, warmup_steps=5))
    batch = tiny.tokens(1, 2, tiny.T + 1, seed=3)
    losses = []
    for _ in range(150):
        state, report = step(state, batch)
        losses.append(float(report.metrics.loss))
    assert losses[0] > 1
    assert losses[-1] < 0.05
    assert (int(state.step), int(state.skipped)) == (150, 0)
    step(state, tiny.tokens(1, 2, tiny.T + 1, seed=4))
    assert step._cache_size() == 1


def test_evaluation_compiles_once_and_ignores_how_windows_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    graphdef, params = built()
    step = make_evaluation_step(graphdef)
    sizes = np.ones(tiny.V, np.int64)
    score = functools.partial(evaluate, step, params, seq_len=tiny.T, token_bytes=sizes)
    streams = [tiny.tokens(n, seed=n) for n in (2, 9, 100, 333)]
    results = [score(stream) for stream in streams]
    assert step._cache_size() == 1
    monkeypatch.setattr("moe_jax.training.evaluate.EVALUATION_ROWS", 5)
    for stream, result in zip(streams, results, strict=True):
        again = score(stream)
        assert again.loss == pytest.approx(result.loss, rel=1e-6)
        assert (again.tokens, again.drop_fraction) == (len(stream) - 1, 0)


def test_a_finite_step_moves_every_parameter() -> None:
    step, state = fresh(TrainConfig(steps=10, warmup_steps=0, weight_decay=0.0))
    before = jax.tree.map(np.array, state.params)
    state, report = step(state, tiny.tokens(2, 4, tiny.T + 1))
    assert bool(report.finite)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params), strict=True):
        assert (old != np.asarray(new)).any(), jax.tree_util.keystr(path)


def test_the_same_step_gives_the_same_bits() -> None:
    config = TrainConfig(steps=10)
    step, first = fresh(config)
    second = initial_state(jax.tree.map(jnp.array, first.params), make_optimizer(config), False)
    batch = tiny.tokens(2, 2, tiny.T + 1)
    tiny.assert_same_bits(step(first, batch), step(second, batch))


def test_float16_overflow_halves_the_scale_and_a_good_scale_gives_the_float32_gradient() -> None:
    """At a scale of 2^30 the gradient of the logits, up to 2^30 / 16 each, is beyond float16's 65,504."""
    step, state = fresh(TrainConfig(steps=10), loss_scaling=True, compute="float16")
    batch = tiny.tokens(1, 2, tiny.T + 1)
    assert float(state.loss_scale.scale) == 2.0**15
    before = jax.tree.map(np.array, state.params)
    too_much = LossScale(jnp.float32(2.0**30), jnp.int32(5))
    state, report = step(jax.tree.map(lambda x: x, state).__class__(**{**vars(state), "loss_scale": too_much}), batch)
    assert not bool(report.finite)
    assert np.isfinite(float(report.metrics.loss))
    assert (float(state.loss_scale.scale), int(state.loss_scale.good_steps)) == (2.0**29, 0)
    tiny.assert_same_bits(jax.tree.map(np.array, state.params), before)
    config = TrainConfig()
    narrow, wide = (
        jax.jit(
            lambda scale, graphdef=built(c)[0]: gradients(
                graphdef, built()[1], jnp.asarray(batch), jax.random.key(0), scale, config
            )[0]
        )(jnp.float32(s))
        for c, s in (("float16", 2.0**10), (None, 1.0))
    )
    total = math.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in jax.tree.leaves(wide)))
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), narrow, wide)
    error = math.sqrt(sum(float((d**2).sum()) for d in jax.tree.leaves(difference)))
    # float16 keeps 11 bits; a dozen roundings in a row of 2^-11 each.
    assert 0 < error / total < 12 * 2**-11


def test_without_float16_the_scale_stays_1() -> None:
    step, state = fresh(TrainConfig(steps=10))
    state, _ = step(state, tiny.tokens(1, 2, tiny.T + 1))
    assert (float(state.loss_scale.scale), int(state.loss_scale.good_steps)) == (1, 0)


def test_the_schedule_by_hand() -> None:
    """Warm-up of 4 from a fifth of the peak in fifths; then 36 steps of cosine: a half way at the 18th of them."""
    rate = learning_rate(TrainConfig(steps=40, warmup_steps=10, lr=1.0, final_lr=0.2))
    assert warmup_steps(TrainConfig(steps=40, warmup_steps=10)) == 4
    assert [float(rate(i)) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert float(rate(4 + 18)) == pytest.approx(0.6)
    assert float(rate(4 + 12)) == pytest.approx(0.2 + 0.8 * 0.75)  # (1 + cos 60) / 2
    assert float(rate(40)) == pytest.approx(0.2)
    falling = [float(rate(i)) for i in range(4, 41)]
    assert falling == sorted(falling, reverse=True)


def test_a_run_too_short_for_warm_up_starts_at_the_peak() -> None:
    rate = learning_rate(TrainConfig(steps=9, warmup_steps=50, lr=1.0))
    assert float(rate(0)) == 1


def test_no_warm_up() -> None:
    rate = learning_rate(TrainConfig(steps=100, warmup_steps=0, lr=1.0))
    assert float(rate(0)) == 1
