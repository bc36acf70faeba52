"""Optimizers that keep less: what their state loses, and that nothing else changes."""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.certify.hlo import parse
from moe_jax.config import OptimizerKind, TrainConfig
from moe_jax.training.optimizers import muon
from moe_jax.training.optimizers.adam import BLOCK, decode, encode, scale_by_adam, scale_by_adam8bit, skippable
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.optimizers.muon import scale_by_muon
from tests.support import tiny


def blocks(seed: int, rows: int = 16) -> jax.Array:
    """Entries over five decades, signs mixed."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, BLOCK)) * 10.0 ** rng.uniform(-5, 0, (rows, BLOCK)), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_codes_are_near_by_and_right_on_average(dtype: type) -> None:
    """The two codes around an entry of code c are (4 c^3 + ...) / most^4 apart: at most 4 / most of the block's
    largest. The mean of n roundings misses by that / (2 sqrt n) in one standard deviation."""
    x = blocks(0) if dtype == jnp.int8 else jnp.abs(blocks(0)) + 1e-6
    most, draws = jnp.iinfo(dtype).max, 512
    decoded = jax.vmap(lambda key: decode(encode(x, key, dtype)))(jax.random.split(jax.random.key(0), draws))
    miss = np.abs(np.asarray(decoded - x)) / np.asarray(jnp.abs(x).max(-1, keepdims=True))
    assert miss.max() < 4 / most
    mean_miss = np.abs(np.asarray(decoded.mean(0) - x)) / np.asarray(jnp.abs(x).max(-1, keepdims=True))
    assert mean_miss.max() < 5 * 4 / most / 2 / draws**0.5


def test_a_second_moment_is_never_rounded_to_zero() -> None:
    tiny = jnp.full((1, BLOCK), 1e-20).at[0, 0].set(1.0)
    assert int(encode(tiny, jax.random.key(0), jnp.uint8).codes.min()) == 1


def run(rule: optax.GradientTransformation, grads: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    params = jax.tree.map(jnp.zeros_like, grads[0])
    state = rule.init(params)
    updates = params
    for g in grads:
        updates, state = rule.update(g, state, params)
    return updates


def gradients(shape: tuple[int, ...], steps: int = 20) -> list[dict[str, jax.Array]]:
    """A constant direction under noise of the same size: a step well away from 0."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=shape)
    return [{"w": jnp.asarray(direction + rng.normal(size=shape), jnp.float32)} for _ in range(steps)]


def test_small_tensors_are_adam_to_rounding_and_large_ones_near_it() -> None:
    """An update of 8-bit Adam is m / sqrt(v), of size 1, each moment off by a few per cent a step."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8)
    ours = scale_by_adam8bit(0.9, 0.99, 1e-8, seed=0)
    small = gradients((63, 65))
    np.testing.assert_allclose(run(ours, small)["w"], run(adam, small)["w"], rtol=2e-6)
    large = gradients((65, 67))  # 4,355 entries: the last block is part filled
    error = np.asarray(run(ours, large)["w"] - run(adam, large)["w"])
    assert error.shape == (65, 67)
    assert 0 < np.sqrt((error**2).mean()) < 0.05


def test_bytes_of_state_by_hand() -> None:
    """Of a stack of 4 experts of 64 x 128 (32,768 entries). Each rule counts its steps: 4 bytes. 8
    bits: 2 bytes an entry and 2 scales of 4 bytes a block of 128. Adafactor: 4 x (64 + 128) numbers."""
    params = {"blocks": {"w": jax.ShapeDtypeStruct((4, 64, 128), jnp.float32)}}
    entries = 4 * 64 * 128
    expected = {"adamw": 8, "adamw-bf16": 6, "adamw-8bit": 2 + 2 * 4 / BLOCK, "adafactor": 4 * 4 * (64 + 128) / entries}
    for kind, size in expected.items():
        optimizer = make_optimizer(TrainConfig(optimizer=kind))  # pyright: ignore[reportArgumentType]
        state = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
        bytes_of_state = sum(x.size * x.dtype.itemsize for x in state)
        assert bytes_of_state / entries == pytest.approx(size + 4 / entries, abs=1e-6), kind


@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_each_optimizer_decays_matrices_only_and_follows_the_schedule(kind: str) -> None:
    """Without a gradient only decay is left: -lr * decay * w, where Muon's matrices have a rate of their own."""
    config = TrainConfig(optimizer=kind, steps=10, warmup_steps=0, lr=0.1, muon_lr=0.3, weight_decay=0.5)  # pyright: ignore[reportArgumentType]
    params = {"blocks": {"w": jnp.full((8, 8), 2.0), "scale": jnp.full((8,), 2.0)}, "embedding": jnp.full((8, 8), 2.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    for decay in (0.5, 0.0):
        rule = make_optimizer(dataclasses.replace(config, weight_decay=decay))
        updates = rule.update(zero, rule.init(params), params, step=0)[0]
        rate = 0.3 if kind == "muon" else 0.1
        np.testing.assert_allclose(updates["blocks"]["w"], -rate * decay * 2, atol=1e-6)
        np.testing.assert_allclose(updates["embedding"], -0.1 * decay * 2, atol=1e-6)
        np.testing.assert_allclose(updates["blocks"]["scale"], 0, atol=1e-6)


@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_a_step_that_is_not_taken_leaves_every_bit_of_the_state(kind: str) -> None:
    config = TrainConfig(steps=10, optimizer=kind)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(0)
    params = {"blocks": {0: {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}}, "norm": jnp.ones(8)}
    optimizer = make_optimizer(config)
    update = jax.jit(lambda g, s, taken: optimizer.update(g, s, params, step=0, taken=taken))
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    _, state = update(grads, optimizer.init(params), True)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    _, after = update(bad, state, False)
    tiny.assert_same_bits(after, state)
    _, moved = update(grads, state, True)
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (moved, state)), strict=True)
    )


def test_adam_keeps_no_copy_of_its_moments() -> None:
    """In a program that owns its state and may skip the step. A selection after the whole update, which works for any
    rule, does copy."""

    def copies(rule: optax.GradientTransformationExtraArgs) -> int:
        params = jnp.zeros((256, 320))

        def step(params, state, grads, taken):
            updates, state = rule.update(grads, state, taken=taken)
            return jnp.where(taken, params - updates, params), state

        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, rule.init(params), params, True)
        computations, _ = parse(lowered.compile().as_text())
        found = (i for computation in computations.values() for i in computation.values())
        return sum(i.opcode == "copy" and i.arrays[0][1] == (256, 320) for i in found)

    assert copies(scale_by_adam(0.9, 0.99, 1e-8)) == 0
    assert copies(skippable(optax.scale_by_adam(0.9, 0.99, 1e-8))) > 0


def test_muon_in_bfloat16_has_the_same_momentum_and_nearly_the_same_directions() -> None:
    """The momentum is that of optax but for its last bits, also over a skipped step. The directions are compared
    without their singular values: five Newton-Schulz steps leave them between 0.68 and 1.14 in float32, and rounding
    moves them within about that range."""

    def polar(stack: Any) -> np.ndarray:
        left, _, right = np.linalg.svd(np.asarray(stack), full_matrices=False)
        return left @ right

    rng = np.random.default_rng(0)
    shapes = {"qkv": (32, 96), "tall": (96, 32), "experts": (3, 32, 64)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    rules = scale_by_muon(), scale_by_muon(narrow=True)
    states: list[Any] = [rule.init(params) for rule in rules]
    update = [jax.jit(rule.update) for rule in rules]
    for n in range(4):
        grads = {k: jnp.asarray(rng.normal(size=s) * 10.0**-n, jnp.float32) for k, s in shapes.items()}
        (whole, states[0]), (narrow, states[1]) = (
            one(grads, state, taken=n != 2) for one, state in zip(update, states, strict=True)
        )
        for name in shapes:
            np.testing.assert_allclose(states[1].mu[name], states[0].mu[name], rtol=1e-6, atol=1e-9)
            assert narrow[name].dtype == jnp.float32
            error = np.linalg.norm(polar(narrow[name]) - polar(whole[name])) / np.linalg.norm(polar(whole[name]))
            assert 1e-3 < error < 0.025, "measured: 0.015"
            values = np.linalg.svd(narrow[name], compute_uv=False)
            assert 0.6 < values.min() < values.max() < 1.2
    assert states[0].count == states[1].count == 3


@pytest.mark.parametrize("largest", [10**9, 5 * 32 * 48, 1])
def test_stacked_matrices_get_the_directions_that_they_get_alone(largest: int, monkeypatch: Any) -> None:
    """Tall and wide matrices of two sizes, also where a stack is full, or where no two arrays fit one."""
    monkeypatch.setattr(muon, "LARGEST_STACK", largest)
    shapes = {"a": (3, 32, 48), "b": (48, 32), "c": (2, 48, 32), "d": (32, 32), "e": (32, 48)}
    rng = np.random.default_rng(0)
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    sizes = [len(group) for group in muon._groups(list(grads.values()))]
    assert sorted(sizes) == {10**9: [1, 4], 5 * 32 * 48: [1, 2, 2], 1: [1] * 5}[largest]
    alone, stacked = (
        rule.update(grads, rule.init(grads))[0] for rule in (scale_by_muon(), scale_by_muon(stacked=True))
    )
    for name in shapes:
        np.testing.assert_allclose(stacked[name], alone[name], atol=1e-5)
