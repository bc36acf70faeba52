"""Checks of the training step, the optimizers and the evaluation, which must catch the bugs of
`tests/support/planted_training.py`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.config import TrainConfig
from moe_jax.data.batches import train_positions
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.gradients import gradients
from moe_jax.training.loss import training_loss
from moe_jax.training.optimizers.adam import BLOCK, decode, scale_by_adam8bit
from moe_jax.training.optimizers.factory import learning_rate, make_optimizer
from moe_jax.training.state import LossScale, initial_state, next_scale
from moe_jax.training.step import apply_updates, clip_factor, global_norm, make_step
from tests.support import oracles, tiny

RANDOM = {"dropout": 0.25, "attention_dropout": 0.25}
"""Every option that draws random numbers in a training step."""
TRAIN = TrainConfig(steps=20, warmup_steps=0, lr=1e-2, aux_loss_coef=0.3, z_loss_coef=0.2)


def check_accumulation(**changes: Any) -> None:
    """Three micro-batches of two are one batch of six: gradients and every metric, in float64. `changes` are options of
    the model, such as dropout, whose masks must be the same however the batch is cut."""
    with jax.enable_x64(True):
        graphdef, params = tiny.build(tiny.config(layers=1, **changes), dtype="float64")
        batch = tiny.tokens(6, tiny.T + 1, seed=2)
        run = jax.jit(lambda b: gradients(graphdef, params, b, jax.random.key(0), jnp.float32(1), TRAIN))
        whole, accumulated = run(batch[None]), run(batch.reshape(3, 2, -1))
        assert max(tiny.gradient_errors(accumulated[0], whole[0]).values()) < 1e-12
        for name, one, other in zip(whole[1]._fields, whole[1], accumulated[1], strict=True):
            if one is other is None:  # the answers of conversations, and these are rows of text
                continue
            # The drop fraction, a share of counts, is float32; all else is float64.
            assert tiny.relative_error(one, other) < (1e-6 if name == "drop_fraction" else 1e-14), name


def check_accumulation_with_dropout() -> None:
    """The same with dropout of both kinds. No two sequences of the batch share their masks."""
    check_accumulation(**RANDOM)


def check_reported_loss() -> None:
    """The reported loss is the cross-entropy. The minimised loss adds the weighted auxiliary losses to it."""
    graphdef, params = tiny.build(tiny.config())
    tokens = jnp.asarray(tiny.tokens(2, tiny.T + 1, seed=1))
    model = merge(graphdef, params)

    @jax.jit
    def run(tokens):
        hidden, stats, _ = model(tokens[:, :-1], Mode.TRAIN)
        return hidden, stats, training_loss(model, tokens, None, TRAIN)

    hidden, stats, (minimised, metrics) = run(tokens)
    head = np.asarray(params["embedding"], np.float64).T
    nats = oracles.cross_entropy(np.asarray(hidden, np.float64).reshape(-1, 8), head, np.asarray(tokens)[:, 1:].ravel())
    np.testing.assert_allclose(metrics.loss, np.mean(nats), rtol=1e-5)
    extra = 0.3 * np.mean(stats.balance_loss) + 0.2 * np.mean(stats.z_loss)
    np.testing.assert_allclose(minimised - metrics.loss, extra, rtol=1e-4)
    np.testing.assert_allclose(metrics.balance_loss, np.mean(stats.balance_loss), rtol=1e-6)
    assert extra > 0.3


def check_loss_scale_cancels() -> None:
    """The scale multiplies the loss and divides the gradient: a power of two leaves every bit of the gradient."""
    graphdef, params = tiny.build(tiny.config(layers=1))
    batch = jnp.asarray(tiny.tokens(1, 2, tiny.T + 1))
    run = jax.jit(lambda scale: gradients(graphdef, params, batch, jax.random.key(0), scale, TRAIN)[0])
    tiny.assert_same_bits(run(jnp.float32(1)), run(jnp.float32(1024)))


def check_bad_gradient_is_skipped() -> None:
    """A NaN in the router: the step changes no bit of parameters and optimizer, and is counted."""
    graphdef, params = tiny.build(tiny.config(layers=1))
    bad = jax.tree.map(jnp.array, params)
    bad["blocks"][0]["ffn"]["router"] = bad["blocks"][0]["ffn"]["router"].at[0, 0].set(jnp.nan)
    optimizer = make_optimizer(TRAIN)
    step = make_step(graphdef, optimizer, TRAIN, loss_scaling=True)
    kept = jax.tree.map(np.array, (bad, optimizer.init(bad)))
    state, report = step(initial_state(bad, optimizer, True), tiny.tokens(1, 2, tiny.T + 1))
    tiny.assert_same_bits((state.params, state.optimizer), kept)
    assert (bool(report.finite), int(state.skipped), int(state.step)) == (False, 1, 1)
    assert float(state.loss_scale.scale) == 2.0**14


def check_loss_scale_moves() -> None:
    """A bad step halves the scale and sets the count to 0. The 2,000th good step in a row doubles the scale."""
    scale = LossScale(jnp.float32(1024), jnp.int32(1998))
    scale = next_scale(scale, jnp.array(True))
    assert (float(scale.scale), int(scale.good_steps)) == (1024, 1999)
    assert float(next_scale(scale, jnp.array(False)).scale) == 512
    assert int(next_scale(scale, jnp.array(False)).good_steps) == 0
    scale = next_scale(scale, jnp.array(True))
    assert (float(scale.scale), int(scale.good_steps)) == (2048, 0)
    assert float(next_scale(LossScale(jnp.float32(1), jnp.int32(0)), jnp.array(False)).scale) == 1


def check_optimizer() -> None:
    """Three steps of AdamW against the paper's algorithm: a matrix decays, a vector does not, gradients are clipped."""
    config = TrainConfig(
        steps=30,
        warmup_steps=2,
        lr=0.1,
        final_lr_ratio=0.1,
        weight_decay=0.5,
        max_grad_norm=1.0,
        beta1=0.8,
        beta2=0.9,
        eps=1e-3,
    )
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(2, 3)), "vector": rng.normal(size=3)}
    grads = [{"matrix": rng.normal(size=(2, 3)) * s, "vector": rng.normal(size=3) * s} for s in (5.0, 0.01, 5.0)]
    norms = [math.sqrt(sum(float((g**2).sum()) for g in step.values())) for step in grads]
    assert norms[0] > 1 > norms[1]
    clipped = [{k: g / max(1, n) for k, g in step.items()} for step, n in zip(grads, norms, strict=True)]
    # Warm-up of 2 from lr / 3: a third, two thirds, then the peak.
    rates = [0.1 / 3, 0.2 / 3, 0.1]
    with jax.enable_x64(True):
        now = jax.tree.map(jnp.asarray, params)
        state = optimizer.init(now)
        for n, step in enumerate(grads):
            factor = clip_factor(global_norm(step), config.max_grad_norm)
            updates, state = optimizer.update(jax.tree.map(lambda g, f=factor: g * f, step), state, now, step=n)
            now = optax.apply_updates(now, updates)
    for name, decay in (("matrix", 0.5), ("vector", 0.0)):
        expected = oracles.adamw(params[name], [g[name] for g in clipped], rates, 0.8, 0.9, 1e-3, decay)
        np.testing.assert_allclose(now[name], expected, rtol=1e-6)


def check_evaluation() -> None:
    """A stream of 20 tokens at T = 8, scored token by token. Windows start at 0, 4, 8 and 11: the last ends with the
    stream. Each window counts only the targets that no earlier window counted: 8, 4, 4 and 3."""
    graphdef, params = tiny.build(tiny.config())
    stream = tiny.tokens(20, seed=9)
    model = merge(graphdef, params)
    run = jax.jit(lambda x: model(x[None], Mode.EVALUATE)[0][0])
    head = np.asarray(params["embedding"], np.float64).T
    nats: list[float] = []
    for start in (0, 4, 8, 11):
        hidden = np.asarray(run(stream[start : start + 8]), np.float64)
        losses = oracles.cross_entropy(hidden, head, stream[start + 1 : start + 9])
        nats += losses[len(nats) - start :]
    assert len(nats) == 19
    sizes = np.arange(tiny.V)  # token i stands for i bytes
    scored = evaluate(make_evaluation_step(graphdef), params, stream, seq_len=tiny.T, token_bytes=sizes)
    assert (scored.tokens, scored.bytes, scored.drop_fraction) == (19, int(stream.sum()), 0)
    np.testing.assert_allclose(scored.loss, np.mean(nats), rtol=1e-5)
    np.testing.assert_allclose(scored.bits_per_byte, sum(nats) / math.log(2) / stream.sum(), rtol=1e-5)


# Schedule, optimizers and their random numbers


def check_schedule() -> None:
    """21 steps with a warm-up of 2: the third step has the peak and the last step the final rate. Half way between, at
    the 12th step, a cosine is half way too."""
    rate = learning_rate(TrainConfig(steps=21, warmup_steps=2, final_lr_ratio=0.5), 1.0)
    np.testing.assert_allclose([float(rate(n)) for n in (0, 1, 2, 11, 20)], [1 / 3, 2 / 3, 1, 0.75, 0.5], rtol=1e-6)


def check_the_applied_rate_is_reported() -> None:
    """Adam without running means moves every entry by exactly the learning rate. So a step shows the rate that was
    applied. It is the rate of the run's step, also after a skipped step, and the rate in the report."""
    config = TrainConfig(
        steps=5, warmup_steps=0, lr=1e-2, final_lr_ratio=0.2, beta1=0, beta2=0, eps=1e-30, weight_decay=0
    )
    graphdef, params = tiny.build(tiny.config(layers=1))
    step = make_step(graphdef, make_optimizer(config), config, loss_scaling=False)
    state = initial_state(jax.tree.map(jnp.array, params), make_optimizer(config), False)
    for n in range(5):
        good = jax.tree.map(np.array, state.params)
        if n == 1:  # this step is skipped
            state = dataclasses.replace(state, params=jax.tree.map(lambda p: jnp.asarray(p) * jnp.nan, good))
        state, report = step(state, tiny.tokens(1, 2, tiny.T + 1, seed=n))
        moved = max(
            float(np.abs(a - np.asarray(b)).max())
            for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(state.params), strict=True)
        )
        assert bool(report.finite) == (n != 1)
        expected = 1e-2 * (0.2 + 0.8 * (1 + math.cos(math.pi * n / 4)) / 2)
        np.testing.assert_allclose(float(report.lr), expected, rtol=1e-5)
        if n == 1:
            state = dataclasses.replace(state, params=jax.tree.map(jnp.asarray, good))
        else:
            np.testing.assert_allclose(moved, expected, rtol=1e-3)


def check_muon() -> None:
    """Four steps of Muon against NumPy loops: momentum, Nesterov's look ahead, and five Newton-Schulz iterations for
    each matrix, also for each of three experts."""
    config = TrainConfig(steps=100, warmup_steps=0, optimizer="muon", muon_lr=0.5, final_lr_ratio=1.0, weight_decay=0.0)
    rng = np.random.default_rng(0)
    shapes = {"wide": (4, 6), "tall": (6, 4), "experts": (3, 5, 4)}
    params = {"blocks": {0: {name: jnp.zeros(shape) for name, shape in shapes.items()}}}
    grads = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(4)]
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    for n, now in enumerate(grads):
        updates, state = optimizer.update({"blocks": {0: jax.tree.map(jnp.asarray, now)}}, state, params, step=n)
        for name, shape in shapes.items():
            history = np.stack([g[name] for g in grads[: n + 1]])
            matrices = history.reshape(n + 1, -1, *shape[-2:])
            expected = np.stack([oracles.muon(matrices[:, i]) for i in range(matrices.shape[1])])
            moved = np.asarray(updates["blocks"][0][name]).reshape(expected.shape)
            np.testing.assert_allclose(moved / -0.5, expected, atol=2e-5, err_msg=f"{name}, step {n}")


def rounded_up(moment: Any, value: np.ndarray) -> np.ndarray:
    """Which entries of a coded moment were rounded up, where `value` is the exact moment."""
    return np.asarray(decode(moment)) > value


def check_moments_are_rounded_independently() -> None:
    """Two equal tensors, whose entries are all equal but for one large entry in each block. A moment is rounded up with
    a known probability. The two moments of a tensor are rounded up together with the product of their probabilities,
    and so is one moment of the two tensors. With one key for both, they would be rounded up together far more often."""
    grad = np.full((64, BLOCK), (93.5 / 127) ** 4, np.float32)  # half way between two codes of int8
    grad[:, 0] = 1.0
    rule = scale_by_adam8bit(0.9, 0.99, 1e-8, seed=0)
    grads = {"a": jnp.asarray(grad), "b": jnp.asarray(grad)}
    _, state = rule.update(grads, rule.init(grads))
    ups = [
        rounded_up(moment[name], value)[:, 1:]
        for name in ("a", "b")
        for moment, value in ((state.first, 0.1 * grad), (state.second, 0.01 * grad**2))
    ]
    share = [up.mean() for up in ups]
    assert all(0.1 < p < 0.9 for p in share), share
    count = ups[0].size
    for one, other in ((0, 1), (0, 2), (1, 3)):
        apart = share[one] * share[other]
        assert abs((ups[one] & ups[other]).mean() - apart) < 5 * math.sqrt(apart * (1 - apart) / count), (one, other)


def check_weights_are_rounded_independently() -> None:
    """Two equal bfloat16 matrices with the same update: 1 + 2^-9 is rounded to 1 or to 1 + 2^-7, a quarter of the
    entries up. Both matrices are rounded up at the same place with probability 1/16."""
    params = {name: jnp.ones((64, 64), jnp.bfloat16) for name in ("a", "b")}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-9), params)
    ups = [np.asarray(p) > 1 for p in apply_updates(params, updates, jax.random.key(0)).values()]
    both = (ups[0] & ups[1]).mean()
    assert abs(both - 1 / 16) < 5 * math.sqrt(1 / 16 * 15 / 16 / 4096)


def check_epochs_have_their_own_order() -> None:
    """The distances between successive windows do not depend on an epoch's offset. Two epochs, or two seeds, with one
    order of windows would have equal distances. In a stream of 100 windows a few may be equal by chance."""
    windows = 1000 // 10

    def distances(seed: int, epoch: int) -> np.ndarray:
        starts = train_positions(1001, seed=seed, step=epoch, batch_size=windows, seq_len=10)[:, 0]
        return np.diff(starts) % 1000

    first = distances(0, 0)
    for other in (distances(0, 1), distances(0, 2), distances(1, 0)):
        assert (first == other).sum() < 10
