"""The training step: what is averaged, scheduled, skipped and compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import TrainConfig
from moe_jax.training.gradients import gradients
from moe_jax.training.optimizers.factory import learning_rate, make_optimizer, muon_labels, warmup_steps
from moe_jax.training.state import TrainState, initial_state
from moe_jax.training.step import make_step
from tests.support import tiny

CONFIG = TrainConfig(steps=150, lr=2e-2, warmup_steps=5)


@functools.lru_cache
def built(compute: str | None = None):
    return tiny.build(tiny.config(layers=1, width=16, capacity_factor=2.0), compute=compute)


@functools.lru_cache
def step_of(loss_scaling: bool = False, compute: str | None = None):
    """The jitted step, shared by the tests: each gives it batches of one shape, so it compiles once."""
    return make_step(built(compute)[0], make_optimizer(CONFIG), CONFIG, loss_scaling)


def fresh(loss_scaling: bool = False) -> TrainState:
    """A state whose memory a step may take over."""
    return initial_state(jax.tree.map(jnp.array, built()[1]), make_optimizer(CONFIG), loss_scaling)


def batch(seed: int = 3) -> np.ndarray:
    return tiny.tokens(1, 2, tiny.T + 1, seed=seed)


def test_a_step_moves_every_parameter_and_leaves_the_scale_of_1() -> None:
    state = fresh()
    before = jax.tree.map(np.array, state.params)
    state, report = step_of()(state, batch())
    assert bool(report.finite)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params), strict=True
    ):
        assert (old != np.asarray(new)).any(), jax.tree_util.keystr(path)
    assert (float(state.loss_scale.scale), int(state.loss_scale.good_steps)) == (1, 0)


def test_float16_gradients_are_near_those_of_float32() -> None:
    def gradient(compute: str | None, scale: float):
        graphdef, params = built(compute)
        tokens = jnp.asarray(batch())
        run = jax.jit(lambda s: gradients(graphdef, params, tokens, jax.random.key(0), s, CONFIG)[0])
        return run(jnp.float32(scale))

    narrow, wide = gradient("float16", 2.0**10), gradient(None, 1.0)
    total = math.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in jax.tree.leaves(wide)))
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), narrow, wide)
    error = math.sqrt(sum(float((d**2).sum()) for d in jax.tree.leaves(difference)))
    # float16 keeps 11 bits; a dozen roundings in a row of 2^-11 each.
    assert 0 < error / total < 12 * 2**-11


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [2, 3, 30, 41])
def test_the_last_step_has_the_final_rate_and_no_other_step(steps: int, schedule: str) -> None:
    config = TrainConfig(steps=steps, warmup_steps=3, final_lr_ratio=0.25, lr_schedule=schedule)  # pyright: ignore[reportArgumentType]
    rates = [float(learning_rate(config, 2.0)(n)) for n in range(steps)]
    assert rates[-1] == pytest.approx(0.5, rel=1e-6)
    assert min(rates[warmup_steps(config) : -1]) > 0.5
    assert max(rates) == 2


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_others() -> None:
    """`check_muon` compares the steps of the matrices with loops. AdamW's first step is the sign of the gradient."""
    rng = np.random.default_rng(0)
    shapes = {"w_in": (3, 6, 4), "router": (6, 3), "qkv": (6, 6), "scale": (6,)}
    params = {"blocks": {0: {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}}}
    params["embedding"] = jnp.asarray(rng.normal(size=(5, 6)))
    labels = muon_labels(params)
    assert labels["blocks"][0] == {"w_in": "muon", "router": "adamw", "qkv": "muon", "scale": "adamw"}
    assert labels["embedding"] == "adamw"
    assert muon_labels(params, routers=True) == {**labels, "blocks": {0: {**labels["blocks"][0], "router": "muon"}}}
    optimizer = make_optimizer(
        TrainConfig(steps=1, optimizer="muon", weight_decay=0.0, max_grad_norm=1e9, lr=0.1, muon_lr=0.5, eps=1e-12)
    )
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    updates = optimizer.update(grads, optimizer.init(params), params, step=0)[0]
    for moved, gradient in (
        (updates["embedding"], grads["embedding"]),
        (updates["blocks"][0]["router"], grads["blocks"][0]["router"]),
        (updates["blocks"][0]["scale"], grads["blocks"][0]["scale"]),
    ):
        np.testing.assert_allclose(moved, -0.1 * np.sign(gradient), rtol=1e-4)
