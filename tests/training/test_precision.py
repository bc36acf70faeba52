"""Narrow numbers: a step that overflows changes nothing, the loss scale is found, and rounded weights still learn."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import TrainConfig
from moe_jax.model import precision
from moe_jax.model.precision import choose_policy, to_param_dtype, writing_policy
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.state import LossScale, TrainState, initial_state
from moe_jax.training.step import make_step
from tests.support import tiny


def configuration(kind: str, **changes: object) -> TrainConfig:
    return TrainConfig(steps=40, lr=2e-2, warmup_steps=4, optimizer=kind, **changes)  # pyright: ignore[reportArgumentType]


@functools.lru_cache
def step_of(kind: str, compute: str):
    graphdef, _ = tiny.build(MODEL, compute=compute)
    return make_step(graphdef, make_optimizer(configuration(kind)), configuration(kind), compute == "float16")


MODEL = tiny.config(layers=1, width=32, expert_hidden=40, capacity_factor=2.0)
"""An expert stack of 4 x 32 x 40 entries: large enough for 8-bit moments."""


def fresh(kind: str, weights: str = "float32", loss_scaling: bool = True) -> TrainState:
    params = jax.tree.map(jnp.array, to_param_dtype(tiny.build(MODEL)[1], weights))  # pyright: ignore[reportArgumentType]
    return initial_state(params, make_optimizer(configuration(kind)), loss_scaling)


def batch(seed: int) -> np.ndarray:
    return tiny.tokens(1, 2, tiny.T + 1, seed=seed)


def test_an_overflow_between_two_steps_changes_the_scale_and_nothing_else() -> None:
    """Step; then a step at a scale of 2^40, whose gradients are beyond float16's 65,504. Parameters, moments and the
    schedule's count keep their bits; only the step, the skipped steps and the scale move. `test_optimizer.py` has a
    step that is not taken for every optimizer."""
    step = step_of("adamw-8bit", "float16")
    state, report = step(fresh("adamw-8bit"), batch(0))
    assert bool(report.finite)
    state = dataclasses.replace(state, loss_scale=LossScale(jnp.float32(2.0**40), jnp.int32(7)))
    before = jax.tree.map(np.array, state)
    state, report = step(state, batch(1))
    assert not bool(report.finite)
    tiny.assert_same_bits(jax.tree.map(np.array, state.params), before.params)
    tiny.assert_same_bits(jax.tree.map(np.array, state.optimizer), before.optimizer)
    assert (float(state.loss_scale.scale), int(state.loss_scale.good_steps)) == (2.0**39, 0)
    assert (int(state.step), int(state.skipped)) == (2, 1)
    for seed in range(2, 30):  # each overflow halves the scale until a step is taken
        state, report = step(state, batch(seed))
        if bool(report.finite):
            break
    assert bool(report.finite)
    assert int(state.skipped) > 1
    changed = [
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True)
    ]
    assert all(changed)


def test_bfloat16_weights_learn_from_steps_smaller_than_their_spacing() -> None:
    """Weights near 1 are 2^-7 apart and a step is some 2^-10: rounded to the nearest none would move."""
    config = dataclasses.replace(configuration("adamw"), lr=1e-3, warmup_steps=0)
    graphdef, _ = tiny.build(MODEL)
    step = make_step(graphdef, make_optimizer(config), config, False)
    state = fresh("adamw", "bfloat16", loss_scaling=False)
    matrices = {str(p.dtype) for p in jax.tree.leaves(state.params) if p.ndim >= 2}
    vectors = {str(p.dtype) for p in jax.tree.leaves(state.params) if p.ndim < 2}
    assert (matrices, vectors) == ({"bfloat16"}, {"float32"})
    assert {str(x.dtype) for x in jax.tree.leaves(state.optimizer) if x.ndim} == {"float32"}
    losses = []
    for _ in range(30):
        state, report = step(state, batch(0))
        losses.append(float(report.metrics.loss))
    assert losses[-1] < losses[0] - 0.02
    assert {str(p.dtype) for p in jax.tree.leaves(state.params) if p.ndim >= 2} == {"bfloat16"}


@pytest.mark.parametrize(
    ("platform", "capability", "processor", "compute", "reason"),
    [
        ("cpu", None, ("GenuineIntel", 6, "fpu avx512_bf16"), "float32", "without fast bfloat16 matrix units"),
        ("cpu", None, ("GenuineIntel", 6, "fpu amx_bf16 avx512_bf16"), "bfloat16", "matrix units, AMX"),
        ("cpu", None, ("AuthenticAMD", 25, "fpu avx512_bf16"), "bfloat16", "matrix units, AVX-512 BF16"),
        ("cpu", None, ("AuthenticAMD", 25, "fpu avx2"), "float32", "without fast bfloat16 matrix units"),
        ("gpu", "7.5", ("GenuineIntel", 6, "amx_bf16"), "float16", "no bfloat16 units"),
        ("gpu", "12.0", ("", 0, ""), "bfloat16", "has bfloat16 units"),
        ("tpu", "", ("", 0, ""), "bfloat16", "other than CUDA"),
    ],
)
def test_the_precision_follows_the_device_and_says_why(
    platform: str,
    capability: str | None,
    processor: tuple[str, int, str],
    compute: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vendor, family, flags = processor
    lines = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\nflags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + lines)
    monkeypatch.setattr(precision.machine, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(
        precision.machine,
        "bfloat16_gain",
        lambda units: 0.74 if vendor == "GenuineIntel" and units != "AMX" else 2.0,
    )
    device = type("Device", (), {"platform": platform, "compute_capability": capability, "device_kind": "a card"})()
    policy = choose_policy("auto", device)
    assert policy.compute == compute
    assert policy.loss_scaling == (compute == "float16")
    assert reason in str(policy)
    assert choose_policy("float32", device).compute == "float32"
    assert writing_policy("auto", device).compute == ("float32" if platform == "cpu" else compute)
    assert writing_policy("bfloat16", device).compute == "bfloat16"
