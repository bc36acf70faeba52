"""Other ways to route: each priority against loops, and which of them leak the future; bias, shared experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import TrainConfig
from moe_jax.model.moe.balance import adjusted_bias, expert_load
from moe_jax.model.moe.dispatch import Capacity
from moe_jax.model.moe.layer import Mode
from moe_jax.model.moe.router import route
from moe_jax.model.transformer import merge
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.state import initial_state
from moe_jax.training.step import make_step
from tests.support import oracles, tiny
from tests.support.leaky import LeakyCapacity, requested_pairs
from tests.support.one_hot import OneHot

B, T, E, K, C = 2, 7, 4, 2, 2
LEAKY = ("leaky-choice-major", "leaky-batch-priority", "leaky-expert-choice")


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, T, E)).astype(np.float32)


def slots_by(priority: str, slots: int = C) -> Capacity:
    return Capacity(slots) if priority == "token" else LeakyCapacity(slots, priority)


def kept_by_loops(z: np.ndarray, priority: str) -> set[tuple[int, int]]:
    """(token, expert) pairs of one sequence that get one of the C slots of their expert."""
    p = np.stack([oracles.softmax(row) for row in z])
    if priority == "leaky-expert-choice":
        return {(t, e) for e in range(E) for t in sorted(range(T), key=lambda t: (-p[t, e], t))[:C]}
    tokens = sorted(range(T), key=lambda t: (-p[t].max(), t)) if priority == "leaky-batch-priority" else range(T)
    queue = [(t, e) for t in tokens for e in oracles.choose(z[t], K)]
    if priority != "token":
        queue = [(t, oracles.choose(z[t], K)[k]) for k in range(K) for t in tokens]
    used, kept = dict.fromkeys(range(E), 0), set()
    for t, e in queue:
        if used[e] < C:
            kept.add((t, e))
        used[e] += 1
    return kept


@pytest.mark.parametrize("priority", ["token", *LEAKY])
def test_priorities_against_loops(priority) -> None:
    capacity_ = slots_by(priority)

    @jax.jit
    def run(z):
        routing = route(z, K)
        plan, queued = capacity_.plan(routing), capacity_.trace(routing)
        return requested_pairs(capacity_, routing), plan, queued, OneHot(capacity_).masks(routing)

    differs = False
    for seed in range(20):
        z = logits(seed)
        routing, plan, queued, (to_slots, _) = run(z)
        keep = np.asarray(plan.keep)
        assert (keep == np.asarray(queued.keep)).all()
        expert = np.asarray(routing.expert_index)
        for b in range(B):
            kept = {(t, int(expert[b, t, k])) for t, k in zip(*np.nonzero(keep[b]), strict=True)}
            expected = kept_by_loops(z[b], priority)
            assert kept == expected
            assert {(t, e) for t, e, _ in zip(*np.nonzero(np.asarray(to_slots)[b]), strict=True)} == expected
            assert np.asarray(to_slots)[b].sum(0).max() <= 1, "two pairs in one slot"
            differs |= expected != kept_by_loops(z[b], "token")
    assert differs == (priority != "token")


@pytest.mark.parametrize("priority", ["token", *LEAKY])
def test_who_leaks_the_future(priority) -> None:
    """Change one token's logits; does a pair of an earlier token win or lose its slot?"""

    @jax.jit
    def keep(z):
        return slots_by(priority).trace(route(z, K)).position < C

    leaks = 0
    for seed in range(20):
        before = logits(seed)
        after = before.copy()
        after[:, 4] = logits(seed + 100)[:, 4]
        leaks += int((np.asarray(keep(before))[:, :4] != np.asarray(keep(after))[:, :4]).sum())
    assert (leaks > 0) == (priority != "token")


def test_a_broken_token_is_last_in_every_queue() -> None:
    z = np.zeros((1, 3, 2), np.float32)
    z[0, 0] = np.nan
    for priority in ("token", *LEAKY):
        plan = slots_by(priority, 1).plan(route(jnp.asarray(z), 2))
        assert plan.keep.tolist() == [[[False, False], [True, True], [False, False]]], priority


def test_bias_moves_the_choice_and_not_the_gates() -> None:
    """p = .6, .3, .1: a bias of .25 on the last makes it second (.35 > .3), with gates .6/.7 and .1/.7."""
    z = jnp.log(jnp.array([[[6.0, 3.0, 1.0]]]))
    routing = route(z, 2, jnp.array([0.0, 0.0, 0.25]))
    assert routing.expert_index.tolist() == [[[0, 2]]]
    np.testing.assert_allclose(routing.gate, [[[6 / 7, 1 / 7]]], rtol=1e-6)


def test_bias_steps_against_the_load() -> None:
    """Fair share 1/4: the loaded expert goes down, the starved two up, the one at its share stays."""
    bias = adjusted_bias(jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([0.5, 0.25, 0.125, 0.125]), 0.1)
    np.testing.assert_allclose(bias, [0.9, 0.0, 0.1, 0.1], rtol=1e-6)


def test_training_moves_the_bias_and_no_optimizer_does() -> None:
    config = tiny.config(balancing="bias")
    train = TrainConfig(steps=10, warmup_steps=0, router_bias_lr=0.25, weight_decay=0.5)
    graphdef, params = tiny.build(config)
    optimizer = make_optimizer(train)
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, False)
    before = [np.asarray(params["blocks"][i]["ffn"]["balance_bias"]) for i in range(2)]
    state, report = make_step(graphdef, optimizer, train, False)(state, tiny.tokens(1, 3, tiny.T + 1))
    for i in range(2):
        load = np.asarray(report.metrics.load)[i]
        expected = before[i] + 0.25 * np.sign(0.25 - load)
        np.testing.assert_allclose(state.params["blocks"][i]["ffn"]["balance_bias"], expected, rtol=1e-6)
        assert (expected != before[i]).any()


def test_bias_evens_out_a_crooked_router() -> None:
    """A router that loves two of four experts, and only its bias may change: the load becomes even."""
    love = np.array([1.5, 1.0, 0.0, -1.0])
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 4)) + love, jnp.float32)
    choose = jax.jit(lambda bias: expert_load(route(z, 2, bias)).mean(0))
    bias = jnp.zeros(4)
    loads = []
    for _ in range(400):
        load = choose(bias)
        loads.append(float(load.max()))
        bias = adjusted_bias(bias, load, 0.002)
    assert loads[0] > 0.4
    assert loads[-1] < 0.27


def test_shared_experts_are_added_to_the_routed_ones(float64: None) -> None:
    shared = tiny.config(shared_experts=2)
    graphdef, params = tiny.build(shared, dtype="float64")
    ffn = params["blocks"][0]["ffn"]
    routed, _ = tiny.build(tiny.config(), dtype="float64")
    alone = {name: value for name, value in ffn.items() if name != "shared"}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, tiny.T, 8)))

    def layer(definition, ffn):
        blocks = {**params["blocks"], 0: {**params["blocks"][0], "ffn": ffn}, 1: {**params["blocks"][1], "ffn": ffn}}
        return merge(definition, {**params, "blocks": blocks}).blocks[0].ffn(x, Mode.TRAIN)[0]

    w = {name: np.asarray(value)[0] for name, value in ffn["shared"].items()}
    assert w["w_in"].shape == (8, 2 * 6)
    own = [[oracles.expert(v, w["w_in"], w["w_out"], w["w_gate"]) for v in row] for row in np.asarray(x)]
    np.testing.assert_allclose(layer(graphdef, ffn), layer(routed, alone) + np.array(own), atol=1e-12)
