"""Checks that run twice: on moe_jax without a bug they pass, and with a planted bug one of them must fail
(`tests/support/planted.py`).

Each check compiles its own small programs, so that the planted bug is traced.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import capacity
from moe_jax.inference.sampling import Sampling, adjusted_logits, sample
from moe_jax.inference.slots import advance, prefill
from moe_jax.model.attention import Attention
from moe_jax.model.layers import dropout
from moe_jax.model.moe.dispatch import Blocks, Capacity
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing, balance_loss, route, z_loss
from moe_jax.model.transformer import merge
from tests.support import oracles, tiny


def compiled(function: Callable, *operands: Any) -> Any:
    """The function's results, by a program of its own: one at a time, its operations would each be compiled."""
    return jax.jit(lambda *operands: function(*operands))(*operands)


def routed(logits: Any, top_k: int) -> Routing:
    return compiled(lambda z: route(z, top_k), jnp.asarray(logits))


def routing_of(chosen: list[list[int]], experts: int, gate: list[list[float]] | None = None) -> Routing:
    """The routing of one sequence whose tokens choose these experts. Its logits give the same choices."""
    logits = np.zeros((1, len(chosen), experts), np.float32)
    for t, choices in enumerate(chosen):
        for k, e in enumerate(choices):
            logits[0, t, e] = 5 - k
    routing = routed(logits, len(chosen[0]))
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
    plan = compiled(Capacity(1).plan, routing_of([[0, 1], [2, 0], [1, 2]], 3))
    assert plan.keep.tolist() == [[[True, True], [True, False], [False, False]]]
    # Pairs are numbered t*K + k. Expert A holds pair 0, B pair 1 (token 0's second), C pair 2 (token 1's first).
    assert plan.pair.tolist() == [[[0]], [[1]], [[2]]]
    # A dropped pair's row is the number of rows, which is out of range on purpose.
    assert plan.row.tolist() == [[[0, 1], [2, 3], [3, 3]]]


def check_far_logits() -> None:
    """Of the logits 200, 90, 50, 0 the second choice is 90, although in float32 only the first has probability > 0."""
    routing = routed([[[0.0, 50.0, 200.0, 90.0]]], 3)
    assert routing.probs[0, 0, [0, 1, 3]].tolist() == [0, 0, 0]
    assert routing.expert_index.tolist() == [[[2, 3, 1]]]


def check_underflown_gate_keeps_its_slot() -> None:
    """A second choice whose gate is exactly 0 still gets its slot: the mask does not depend on gates."""
    routing = routed([[[200.0, 0.0], [200.0, 0.0]]], 2)
    assert routing.gate[0, :, 1].tolist() == [0, 0]
    assert compiled(Capacity(1).plan, routing).keep.tolist() == [[[True, True], [False, False]]]


def check_single_gate() -> None:
    """For K = 1 the gate is p, and d p_0 / d z = p_0 (1 - p_0, -p_1, ...). Logits ln 2 and 0: p = 2/3, 1/3."""
    logits = jnp.array([[[math.log(2.0), 0.0]]])
    gate, gradient = compiled(jax.value_and_grad(lambda z: route(z, 1).gate.sum()), logits)
    np.testing.assert_allclose(gate, 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[2 / 9, -2 / 9]]], rtol=1e-6)


def check_renormalised_gates() -> None:
    """For K = 2, logits ln 6, ln 3, ln 1: p = .6, .3, .1, and the gates are 2/3 and 1/3."""
    gate = routed(np.log([[[6.0, 3.0, 1.0]]]), 2).gate
    np.testing.assert_allclose(gate, [[[2 / 3, 1 / 3]]], rtol=1e-6)


def check_invalid_token() -> None:
    """One token has a NaN logit. The token takes no slot, so the next token gets it. Only the invalid token's output is
    NaN."""
    routing = routed([[[jnp.nan, 0.0], [2.0, 1.0], [1.0, 2.0]]], 1)
    assert compiled(Capacity(1).plan, routing).keep.tolist() == [[[False], [True], [True]]]
    assert compiled(lambda r: Blocks(2).plan(r)[0], routing).keep.tolist() == [[[False], [True], [True]]]
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
def _layer(renormalise: bool) -> tuple[np.ndarray, dict[str, np.ndarray], MoE]:
    config = tiny.config(layers=1, width=4, expert_hidden=3, renormalise_gates=renormalise)
    graphdef, params = tiny.build(config)
    layer = merge(graphdef, params).blocks[0].ffn
    weights = {"router": layer.router[...], **params["blocks"][0]["ffn"]["experts"]}
    x = np.random.default_rng(1).normal(size=(2, tiny.T, 4)).astype(np.float32)
    return x, {k: np.asarray(v, np.float64) for k, v in weights.items()}, layer


def check_layer_with_plain_gates() -> None:
    """The gates are entries of the full softmax, so their sum over the K experts is less than 1."""
    check_layer_with_drops(renormalise=False)


def check_layer_with_drops(renormalise: bool = True) -> None:
    """A layer with a capacity, under drops, against NumPy loops: the output, and the number of drops exactly."""
    x, weights, layer = _layer(renormalise)
    slots = capacity(tiny.T, 4, 2, 0.5)
    y, stats = jax.jit(lambda x: layer(x, Mode.TRAIN))(x)
    matrices = [weights[name] for name in ("router", "w_in", "w_out", "w_gate")]
    expected, dropped = oracles.moe(x.astype(np.float64), *matrices, 2, slots, renormalise)
    pairs = 2 * tiny.T * 2
    assert pairs / 2 <= dropped < pairs
    np.testing.assert_allclose(stats.drop_fraction.mean(), dropped / pairs, atol=1e-7)
    assert tiny.relative_error(y, expected) < 1e-6


def check_balance_loss() -> None:
    """Worked by hand, and 1 at perfect balance for every K.

    One token, two experts, logits ln 3 and 0: p = 3/4, 1/4. K = 1: f = (1, 0), so 2 * 3/4 = 1.5.
    Two such sequences, the second with the experts swapped: the mean over sequences is 1.5 still. Taken over the
    batch as one group it would be 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
    """
    logits = [[[math.log(3.0), 0.0]], [[0.0, math.log(3.0)]]]
    np.testing.assert_allclose(compiled(balance_loss, routed(logits, 1)), 1.5, rtol=1e-6)
    # Four tokens in turn prefer experts 0 to 3 and then their right neighbours: f and P are uniform.
    turn = np.stack([np.roll([3.0, 2.0, 1.0, 0.0], i) for i in range(4)])[None]
    for top_k in (1, 2, 3, 4):
        np.testing.assert_allclose(compiled(balance_loss, routed(turn, top_k)), 1, rtol=1e-6)


def check_z_loss() -> None:
    """Logits (0, 0) and (ln 3, 0): logsumexp ln 2 and ln 4, so (ln 2)^2 (1 + 4) / 2."""
    logits = [[[0.0, 0.0], [math.log(3.0), 0.0]]]
    np.testing.assert_allclose(compiled(z_loss, routed(logits, 1)), 2.5 * math.log(2) ** 2, rtol=1e-6)


# The whole model


def check_causal(**changes: Any) -> None:
    """Change token t of either row, under real drops: everything before t is the same to the last bit, t and later
    differ, and the other row is the same."""
    graphdef, params = tiny.build(tiny.config(**changes))

    @jax.jit
    def run(tokens):
        hidden, stats, _ = merge(graphdef, params)(tokens, Mode.TRAIN)
        return hidden, stats.drop_fraction

    for seed in range(4):
        before = tiny.tokens(2, tiny.T, seed=seed)
        hidden, dropped = run(before)
        assert (dropped >= 0.5).all()
        for row, t in itertools.product(range(2), range(tiny.T)):
            after = before.copy()
            after[row, t] = (after[row, t] + 1 + seed) % tiny.V
            changed = (np.asarray(run(after)[0]) != np.asarray(hidden)).any(-1)
            assert not changed[row, :t].any(), f"a token before {t} of row {row} saw it"
            assert changed[row, t:].all()
            assert not changed[1 - row].any()


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


def check_cached_decoding_of_grouped_heads() -> None:
    """Four heads of width 6 (not 8 / 4) that share two key heads."""
    check_cached_decoding(heads=4, kv_heads=2, head_size=6, qk_norm="full", rope_theta=50.0, renormalise_gates=False)


def check_dropout_is_scaled() -> None:
    """Entries are 0 or x / (1 - rate). At rate 1/4 the share of zeros is 0.25 +- 0.07 (10 standard deviations)."""
    x = jnp.arange(1.0, 4001.0)
    y = np.asarray(dropout(x[None], 0.25, jax.random.split(jax.random.key(0), 1)))[0]
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
    keys = jax.random.split(jax.random.key(1), 32)
    plain, dropped = compiled(lambda x, keys: (layer(x)[0][:, 0], layer(x, keys)[0][:, 0]), x, keys)
    plain, dropped = np.asarray(plain), np.asarray(dropped)
    zero = (np.asarray(dropped) == 0).all(-1)
    assert 0 < zero.sum() < 32
    np.testing.assert_allclose(dropped[~zero], 2 * plain[~zero], rtol=1e-5, atol=1e-6)


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


def check_each_row_has_its_own_filters() -> None:
    """Three rows of different logits and seen tokens: each row is adjusted as it would be alone."""
    rng = np.random.default_rng(4)
    logits = jnp.asarray(rng.normal(size=(3, 7)) * [[1.0], [3.0], [0.3]], jnp.float32)
    seen = jnp.asarray(rng.random((3, 7)) < [[0.2], [0.5], [0.8]])
    for changes in ({"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"temperature": 0.0}):
        settings = Sampling(**({"temperature": 0.7, "repetition_penalty": 1.5} | changes))
        together = np.asarray(adjusted_logits(logits, settings, seen))
        for row in range(3):
            alone = adjusted_logits(logits[row : row + 1], settings, seen[row : row + 1])
            np.testing.assert_allclose(together[row], alone[0], rtol=1e-6, err_msg=f"{changes}, row {row}")


def check_filters_of_many_tokens() -> None:
    """More tokens than are put in order at first: 3,000 in three rows, of which few, some and most pass. Each is
    ranked by NumPy, equals by lower id."""
    rng = np.random.default_rng(5)
    logits = np.round(rng.normal(size=(3, 3000)) * [[6.0], [1.5], [0.2]], 1).astype(np.float32)
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    order = np.argsort(-p, axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    descending = np.take_along_axis(p, order, 1)
    before = np.take_along_axis(np.cumsum(descending, 1) - descending, rank, 1)
    cases = {
        ("top_k", 1023): rank < 1023,
        ("top_k", 1024): rank < 1024,
        ("top_k", 2000): rank < 2000,
        ("top_p", 0.7): before < np.float32(0.7),
        ("top_p", 0.999): before < np.float32(0.999),
        ("min_p", 0.05): p >= np.float32(0.05) * p.max(1, keepdims=True),
    }
    for (name, value), expected in cases.items():
        found = adjusted_logits(jnp.asarray(logits), Sampling(1.0, **{name: value}), jnp.zeros(logits.shape, bool))
        np.testing.assert_array_equal(np.isfinite(found), expected, err_msg=f"{name} {value}")


def check_each_row_draws_for_itself() -> None:
    """64 rows of equal logits draw many different tokens. If all rows shared one draw, they would be equal."""
    drawn = sample(jnp.zeros((64, 100)), Sampling(temperature=1.0), jnp.zeros((64, 100), bool), jax.random.key(0))
    assert len(np.unique(np.asarray(drawn))) > 30
