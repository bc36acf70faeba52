"""Checks that run twice: on moe_jax without a bug they pass, and with a planted bug one of them must fail
(`tests/support/planted.py`).

Each check compiles its own small programs, so that the planted bug is traced.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.config import TrainConfig, capacity
from moe_jax.inference.decode import advance, prefill
from moe_jax.inference.sampling import Sampling, adjusted_logits
from moe_jax.model.attention import Attention
from moe_jax.model.layers import dropout
from moe_jax.model.moe.balance import balance_loss, z_loss
from moe_jax.model.moe.dispatch import Blocks, Capacity
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing, route
from moe_jax.model.transformer import merge
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.loss import training_loss
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.state import LossScale, initial_state, next_scale
from moe_jax.training.step import clip_factor, global_norm, gradients, make_step
from tests.support import oracles, tiny


def routing_of(chosen: list[list[int]], experts: int, gate: list[list[float]] | None = None) -> Routing:
    """The routing of one sequence whose tokens choose these experts. Its logits give the same choices."""
    logits = np.zeros((1, len(chosen), experts), np.float32)
    for t, choices in enumerate(chosen):
        for k, e in enumerate(choices):
            logits[0, t, e] = 5 - k
    routing = route(jnp.asarray(logits), len(chosen[0]))
    assert routing.expert_index[0].tolist() == chosen
    return routing if gate is None else routing._replace(gate=jnp.asarray([gate]))


# Routing and dispatch


def check_three_tokens() -> None:
    """Three tokens, three experts A B C, two choices each, one slot an expert.

    Token 0 chooses A then B: both are free, it gets both.
    Token 1 chooses C then A: C is free; A was taken by token 0, so this choice is dropped.
    Token 2 chooses B then C: B was taken by token 0 and C by token 1, so both are dropped.

    Choice-major order would give B to token 2, because B is its first choice, and take B from token 0.
    """
    plan = Capacity(1).plan(routing_of([[0, 1], [2, 0], [1, 2]], 3))
    assert plan.keep.tolist() == [[[True, True], [True, False], [False, False]]]
    # Pairs are numbered t*K + k. Expert A holds pair 0, B pair 1 (token 0's second), C pair 2 (token 1's first).
    assert plan.pair.tolist() == [[[0]], [[1]], [[2]]]
    # A dropped pair's row is the number of rows, which is out of range on purpose.
    assert plan.row.tolist() == [[[0, 1], [2, 3], [3, 3]]]


def check_far_logits() -> None:
    """Of the logits 200, 90, 50, 0 the second choice is 90, although in float32 only the first has probability > 0."""
    routing = route(jnp.array([[[0.0, 50.0, 200.0, 90.0]]]), 3)
    assert routing.probs[0, 0, [0, 1, 3]].tolist() == [0, 0, 0]
    assert routing.expert_index.tolist() == [[[2, 3, 1]]]


def check_underflown_gate_keeps_its_slot() -> None:
    """A second choice whose gate is exactly 0 still gets its slot: the mask does not depend on gates."""
    routing = route(jnp.array([[[200.0, 0.0], [200.0, 0.0]]]), 2)
    assert routing.gate[0, :, 1].tolist() == [0, 0]
    assert Capacity(1).plan(routing).keep.tolist() == [[[True, True], [False, False]]]


def check_single_gate() -> None:
    """For K = 1 the gate is p, and d p_0 / d z = p_0 (1 - p_0, -p_1, ...). Logits ln 2 and 0: p = 2/3, 1/3."""
    logits = jnp.array([[[math.log(2.0), 0.0]]])
    gate, gradient = jax.value_and_grad(lambda z: route(z, 1).gate.sum())(logits)
    np.testing.assert_allclose(gate, 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[2 / 9, -2 / 9]]], rtol=1e-6)


def check_renormalised_gates() -> None:
    """For K = 2, logits ln 6, ln 3, ln 1: p = .6, .3, .1, and the gates are 2/3 and 1/3."""
    gate = route(jnp.log(jnp.array([[[6.0, 3.0, 1.0]]])), 2).gate
    np.testing.assert_allclose(gate, [[[2 / 3, 1 / 3]]], rtol=1e-6)


def check_invalid_token() -> None:
    """One token has a NaN logit. The token takes no slot, so the next token gets it. Only the invalid token's output is
    NaN."""
    logits = jnp.array([[[jnp.nan, 0.0], [2.0, 1.0], [1.0, 2.0]]])
    routing = route(logits, 1)
    assert Capacity(1).plan(routing).keep.tolist() == [[[False], [True], [True]]]
    assert Blocks(2).plan(routing)[0].keep.tolist() == [[[False], [True], [True]]]
    config = tiny.config(layers=1, experts=3, width=4, expert_hidden=3)
    graphdef, params = tiny.build(config)
    x = np.random.default_rng(3).normal(size=(1, 3, 4)).astype(np.float32)
    x[0, 1] = np.nan
    run = jax.jit(lambda x: merge(graphdef, params).blocks[0].ffn(x, Mode.EVALUATE)[0])
    broken, whole = run(jnp.asarray(x)), run(jnp.asarray(np.delete(x, 1, axis=1)))
    assert np.isnan(broken[0, 1]).all()
    np.testing.assert_allclose(broken[0, [0, 2]], whole[0], rtol=1e-5, atol=1e-6)


def check_capacity() -> None:
    """ceil(cf * T * K / E) for T = 256, K = 2, E = 16: 32 fair, 1.25 -> 40, 1.1 -> 35.2 -> 36."""
    assert [capacity(256, 16, 2, cf) for cf in (1.0, 1.25, 1.1)] == [32, 40, 36]
    # 11/10 * 1000 / 10 is 110 exactly; the binary 1.1 is a little more, and would give 111.
    assert capacity(1000, 10, 1, 1.1) == 110


@functools.lru_cache
def _layer(activation: str, top_k: int) -> tuple[np.ndarray, dict[str, np.ndarray], MoE]:
    config = tiny.config(layers=1, activation=activation, top_k=top_k, width=4, expert_hidden=3)
    graphdef, params = tiny.build(config)
    layer = merge(graphdef, params).blocks[0].ffn
    weights = {"router": layer.router[...], **params["blocks"][0]["ffn"]["experts"]}
    x = np.random.default_rng(1).normal(size=(2, tiny.T, 4)).astype(np.float32)
    return x, {k: np.asarray(v, np.float64) for k, v in weights.items()}, layer


def check_layer_with_drops(activation: str = "swiglu", top_k: int = 2) -> None:
    """A layer with a capacity, under drops, against NumPy loops: the output, and the number of drops exactly."""
    x, weights, layer = _layer(activation, top_k)
    slots = capacity(tiny.T, 4, top_k, 0.5)
    y, stats = jax.jit(lambda x: layer(x, Mode.TRAIN))(x)
    expected, dropped = oracles.moe(
        x.astype(np.float64),
        weights["router"],
        weights["w_in"],
        weights["w_out"],
        weights.get("w_gate"),
        top_k,
        slots,
    )
    pairs = 2 * tiny.T * top_k
    assert pairs / 2 <= dropped < pairs
    np.testing.assert_allclose(stats.drop_fraction.mean(), dropped / pairs, atol=1e-7)
    assert tiny.relative_error(y, expected) < 1e-6


def check_balance_loss() -> None:
    """Worked by hand, and 1 at perfect balance for every K.

    One token, two experts, logits ln 3 and 0: p = 3/4, 1/4. K = 1: f = (1, 0), so 2 * 3/4 = 1.5.
    Two such sequences, the second with the experts swapped: the mean over sequences is 1.5 still. Taken over the
    batch as one group it would be 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
    """
    logits = jnp.array([[[math.log(3.0), 0.0]], [[0.0, math.log(3.0)]]])
    np.testing.assert_allclose(balance_loss(route(logits, 1)), 1.5, rtol=1e-6)
    # Four tokens in turn prefer experts 0 to 3 and then their right neighbours: f and P are uniform.
    turn = jnp.stack([jnp.roll(jnp.array([3.0, 2.0, 1.0, 0.0]), i) for i in range(4)])[None]
    for top_k in (1, 2, 3, 4):
        np.testing.assert_allclose(balance_loss(route(turn, top_k)), 1, rtol=1e-6)


def check_z_loss() -> None:
    """Logits (0, 0) and (ln 3, 0): logsumexp ln 2 and ln 4, so (ln 2)^2 (1 + 4) / 2."""
    logits = jnp.array([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    np.testing.assert_allclose(z_loss(route(logits, 1)), 2.5 * math.log(2) ** 2, rtol=1e-6)


# The whole model


def check_causal() -> None:
    """Change token t, under real drops: everything before t is the same to the last bit, t and later differ."""
    graphdef, params = tiny.build(tiny.config())

    @jax.jit
    def run(tokens):
        hidden, stats, _ = merge(graphdef, params)(tokens, Mode.TRAIN)
        return hidden, stats.drop_fraction

    for seed in range(6):
        before = tiny.tokens(2, tiny.T, seed=seed)
        hidden, dropped = run(before)
        assert (dropped >= 0.5).all()
        for t in range(tiny.T):
            after = before.copy()
            after[0, t] = (after[0, t] + 1 + seed) % tiny.V
            changed, _ = run(after)
            assert (np.asarray(changed[0, :t]) == np.asarray(hidden[0, :t])).all(), f"a token before {t} saw it"
            assert (np.asarray(changed[0, t:]) != np.asarray(hidden[0, t:])).any(-1).all()


def check_rows_are_independent() -> None:
    """Change all of row 0, under real drops: row 1 is the same to the last bit."""
    graphdef, params = tiny.build(tiny.config())
    run = jax.jit(lambda tokens: merge(graphdef, params)(tokens, Mode.TRAIN)[:2])
    for seed in range(4):
        tokens = tiny.tokens(2, tiny.T, seed=seed)
        hidden, stats = run(tokens)
        assert (stats.drop_fraction >= 0.5).all()
        tokens[0] = tiny.tokens(tiny.T, seed=100 + seed)
        changed, _ = run(tokens)
        assert (np.asarray(changed[1]) == np.asarray(hidden[1])).all()
        assert (np.asarray(changed[0]) != np.asarray(hidden[0])).any()


def check_cached_decoding(**changes: Any) -> None:
    """Prefill 3 tokens, decode the rest one by one: the logits of every position are those of one uncached pass."""
    graphdef, params = tiny.build(tiny.config(**changes))
    tokens = tiny.tokens(2, tiny.T, seed=5)
    model = merge(graphdef, params)
    expected = jax.jit(lambda x: model.logits(model(x, Mode.EVALUATE)[0]))(tokens)
    padded = np.where(np.arange(tiny.T) < 3, tokens, 0)
    state = jax.jit(functools.partial(prefill, graphdef))(params, padded, np.int32(3))
    step = jax.jit(functools.partial(advance, graphdef))
    for t in range(2, tiny.T):
        np.testing.assert_allclose(state.logits, expected[:, t], atol=1e-5 * float(np.abs(expected).max()))
        if t + 1 < tiny.T:
            state = step(params, state, tokens[:, t + 1])


def check_dropout_is_scaled() -> None:
    """Entries are 0 or x / (1 - rate). At rate 1/4 the share of zeros is 0.25 +- 0.07 (10 standard deviations)."""
    x = jnp.arange(1.0, 4001.0)
    y = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.07


def check_attention_dropout_is_scaled() -> None:
    """The first position attends only to itself, with weight 1. Its output is 0, or the output without dropout
    divided by 1 - rate."""
    config = tiny.config(layers=1, heads=1, attention_dropout=0.5)
    graphdef, params = tiny.build(config)
    layer: Attention = merge(graphdef, params).blocks[0].attention
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 2, 8)), jnp.float32)
    plain, dropped = layer(x)[0][:, 0], layer(x, jax.random.key(1))[0][:, 0]
    zero = (np.asarray(dropped) == 0).all(-1)
    assert 0 < zero.sum() < 32
    np.testing.assert_allclose(dropped[~zero], 2 * plain[~zero], rtol=1e-5, atol=1e-6)


# Training


TRAIN = TrainConfig(steps=20, warmup_steps=0, lr=1e-2, aux_loss_coef=0.3, z_loss_coef=0.2)


def check_accumulation() -> None:
    """Three micro-batches of two are one batch of six: gradients and every metric, in float64."""
    with jax.enable_x64(True):
        graphdef, params = tiny.build(tiny.config(layers=1), dtype="float64")
        batch = tiny.tokens(6, tiny.T + 1, seed=2)
        run = jax.jit(lambda b: gradients(graphdef, params, b, jax.random.key(0), jnp.float32(1), TRAIN))
        whole, accumulated = run(batch[None]), run(batch.reshape(3, 2, -1))
        assert max(tiny.gradient_errors(accumulated[0], whole[0]).values()) < 1e-12
        measured = [m._replace(trace=()) for m in (whole[1], accumulated[1])]  # nothing was traced
        for name, one, other in zip(whole[1]._fields, *measured, strict=True):
            # The drop fraction, a share of counts, is float32; all else is float64.
            assert tiny.relative_error(one, other) < (1e-6 if name == "drop_fraction" else 1e-14), name


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
        for step in grads:
            factor = clip_factor(global_norm(step), config.max_grad_norm)
            updates, state = optimizer.update(jax.tree.map(lambda g, f=factor: g * f, step), state, now)
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


# Generation


def check_filters() -> None:
    """The tokens that each filter leaves, found by hand, for probabilities 0.5, 0.3, 0.15, 0.05 in mixed order."""
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
    nothing_seen = jnp.zeros((1, 4), bool)

    def left(**settings: float) -> list[int]:
        out = adjusted_logits(logits, Sampling(**({"temperature": 1.0} | settings)), nothing_seen)
        return np.flatnonzero(np.isfinite(out[0])).tolist()

    assert left() == [0, 1, 2, 3]
    assert left(top_k=2) == [1, 3]
    assert left(top_k=9) == [0, 1, 2, 3]
    assert left(top_p=0.45) == [1]  # the likeliest alone has 0.5
    assert left(top_p=0.6) == [1, 3]  # 0.5 is not enough, 0.8 is
    assert left(top_p=0.9) == [0, 1, 3]
    assert left(min_p=0.2) == [0, 1, 3]  # 0.2 * 0.5 = 0.1
    assert left(min_p=0.5) == [1, 3]  # 0.25
    assert left(min_p=1.0) == [1]
    assert left(top_k=3, min_p=0.5) == [1, 3]  # a token must pass all
    assert left(top_k=2, top_p=0.9) == [1, 3]
    assert left(temperature=0.0) == [1]
    # The filters act on the tempered distribution: at temperature 1/2 it is 0.25, 0.09, 0.0225, 0.0025 over 0.365,
    # so the likeliest alone has 0.68.
    assert left(temperature=0.5, top_p=0.6) == [1]
