"""What a run executes comes from one place, and computes the same with the plain cross-entropy."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ComputeDtype, ExecutionConfig, RunConfig, TrainConfig
from moe_jax.config.train import NEWTON_SCHULZ_STEPS
from moe_jax.model.kernels import cross_entropy
from moe_jax.training.gradients import gradients
from moe_jax.training.loss import training_loss
from moe_jax.training.programs import Programs
from tests.support import tiny

CONFIG = RunConfig(
    model=tiny.config(layers=1, width=16),
    train=TrainConfig(steps=20, warmup_steps=0, lr=1e-2),
    execution=ExecutionConfig(compute_dtype="float32"),
)


def batch(seed: int = 3, micro_batches: int = 1) -> np.ndarray:
    return tiny.tokens(micro_batches, 2, tiny.T + 1, seed=seed)


def test_the_plain_cross_entropy_gives_the_same_loss_and_gradients() -> None:
    """To a few float32 roundings: the two sum the same terms in another order."""
    programs = Programs.of(CONFIG)
    params, tokens, key = programs.initial_params(), jnp.asarray(batch()), jax.random.key(0)

    def gradient(implementation: cross_entropy.Implementation) -> Any:
        loss = partial(training_loss, implementation=implementation)
        return jax.jit(lambda p: gradients(programs.graphdef, p, tokens, key, None, CONFIG.train, loss=loss))(params)

    (ours, metrics), (plain, plain_metrics) = gradient("blocked"), gradient("reference")
    assert float(metrics.loss) == pytest.approx(float(plain_metrics.loss), rel=1e-6)
    errors = tiny.gradient_errors(ours, plain)
    assert max(errors.values()) < 1e-5, errors
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(plain)) > 1e-3


def test_float16_scales_the_loss_and_the_parameters_are_stored_as_asked() -> None:
    narrow = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, param_dtype="bfloat16"),
        execution=ExecutionConfig(compute_dtype="float16"),
    )
    programs = Programs.of(narrow)
    assert programs.policy.loss_scaling
    params = programs.initial_params()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert shapes == programs.param_shapes
    assert {str(p.dtype) for p in jax.tree.leaves(params) if p.ndim >= 2} == {"bfloat16"}
    state = programs.state(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), programs.state_shapes
    )
    assert float(state.loss_scale.scale) == 2.0**15
    assert float(Programs.of(CONFIG).state(params).loss_scale.scale) == 1


@pytest.mark.parametrize(
    ("precision", "units", "narrow"), [("bfloat16", "AMX", True), ("bfloat16", "", False), ("float32", "AMX", False)]
)
def test_muon_is_in_bfloat16_where_a_cpu_multiplies_it_fast(
    precision: ComputeDtype, units: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in a run in bfloat16 only. Then matrices of one size are one stack, with three products an iteration."""
    monkeypatch.setattr("moe_jax.training.programs.cpu_bfloat16_units", lambda: units)
    train = dataclasses.replace(CONFIG.train, optimizer="muon")
    execution = ExecutionConfig(compute_dtype=precision)
    programs = Programs.of(dataclasses.replace(CONFIG, train=train, execution=execution))
    shapes = programs.param_shapes
    step = jax.make_jaxpr(lambda p: programs.optimizer.update(p, programs.optimizer.init(p), p, step=0, taken=True)[0])
    products = [line for line in str(step(shapes)).splitlines() if "dot_general" in line]
    assert all(("bf16[" in line) == narrow for line in products)
    named = jax.tree_util.tree_leaves_with_path(shapes["blocks"])
    matrices = [p for path, p in named if p.ndim >= 2 and "router" not in jax.tree_util.keystr(path)]
    shapes_or_arrays = {tuple(sorted(p.shape[-2:])) for p in matrices} if narrow else matrices
    assert len(products) == 3 * NEWTON_SCHULZ_STEPS * len(shapes_or_arrays)
