"""The batch is an axis of its own: a sequence's plan and rows are those it has alone, and a batch that is split over
devices needs no communication."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.model.moe import dispatch as d
from moe_jax.model.moe.layer import layer_function, with_gradients
from moe_jax.model.moe.router import Routing, route
from tests.support import tiny

B, T, E, K, C, WIDTH = 3, 7, 4, 2, 3, 5


@functools.lru_cache
def compiled(batch: int):
    """(logits, x, cotangents of rows and y) -> plan, queue, rows, y and every gradient, for so many sequences."""
    capacity = d.Capacity(C)
    del batch  # one entry of the cache, and one program, for each size

    def run(logits, x, d_rows, d_y):
        routing = route(logits, K)
        plan, gate = capacity.plan(routing), routing.gate
        rows, pull_rows = jax.vjp(lambda x: d.dispatch(x, plan), x)
        y, pull_y = jax.vjp(lambda rows, gate: d.combine(d.gated(rows, d.row_gates(gate, plan)), plan), rows, gate)
        d_x, (d_rows_of_y, d_gate) = pull_rows(d_rows)[0], pull_y(d_y)
        leading = (plan.row, plan.keep, *capacity.trace(routing), y, d_x, d_gate)
        return (plan.pair, rows, d_rows_of_y), leading

    return jax.jit(run)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), broken=st.booleans(), crowded=st.booleans())
def test_a_batch_is_its_sequences_one_by_one(seed: int, broken: bool, crowded: bool) -> None:
    """To the last bit: plan, queue, rows, output and gradients. With a NaN in one sequence, and with drops."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, T, E)).astype(np.float32)
    if crowded:
        logits[..., 1] += 3
    if broken:
        logits[1, 2, 0] = np.nan
    groups = E
    x, d_y = rng.normal(size=(2, B, T, WIDTH)).astype(np.float32)
    d_rows = rng.normal(size=(groups, B, C, WIDTH)).astype(np.float32)
    second, first = compiled(B)(logits, x, d_rows, d_y)
    assert second[0].shape == (groups, B, C)
    for b in range(B):
        one = slice(b, b + 1)
        alone_second, alone_first = compiled(1)(logits[one], x[one], d_rows[:, one], d_y[one])
        for whole, alone in [
            *zip((np.asarray(a)[:, one] for a in second), alone_second, strict=True),
            *zip((np.asarray(a)[one] for a in first), alone_first, strict=True),
        ]:
            np.testing.assert_array_equal(whole, alone)


def test_permuting_sequences_permutes_the_plan() -> None:
    """Worked by hand: two sequences of two tokens, two experts with one slot each.

    In the first both tokens want A, so token 1 is dropped. In the second token 0 wants B and token 1 wants A.
    """
    logits = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    plan = d.Capacity(1).plan(route(logits, 1))
    # pair[expert][sequence]: A holds pair 0 of the first sequence and pair 1 of the second; B holds none and pair 0.
    assert plan.pair.tolist() == [[[0], [1]], [[2], [0]]]
    assert plan.row.tolist() == [[[0], [2]], [[1], [0]]]
    assert plan.keep.tolist() == [[[True], [False]], [[True], [True]]]
    swapped = d.Capacity(1).plan(route(logits[::-1], 1))
    tiny.assert_same_bits(swapped, d.Plan(plan.pair[:, ::-1], plan.row[::-1], plan.keep[::-1]))


def test_blocks_take_the_whole_batch_as_one_sequence() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, E)), jnp.float32)
    routing = route(logits, K)
    flat: Routing = jax.tree.map(lambda x: x.reshape(1, 6, *x.shape[2:]), routing)
    tiny.assert_same_bits(d.Blocks(4).plan(routing), d.Blocks(4).plan(flat))


def test_a_layer_drops_and_serves_each_sequence_as_if_it_were_alone(float64: None) -> None:
    """The whole layer under drops, with the experts: outputs, and the sum of the sequences' gradients."""
    function, params = layer_function(tiny.config(layers=1))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    x, cotangent = jnp.asarray(rng.normal(size=(2, 3, tiny.T, 8)))
    run = jax.jit(with_gradients(function))
    y, (d_params, d_x) = run(params, x, cotangent)
    alone = [run(params, x[b : b + 1], cotangent[b : b + 1]) for b in range(3)]
    np.testing.assert_allclose(y, np.concatenate([a[0] for a in alone]), atol=1e-12)
    np.testing.assert_allclose(d_x, np.concatenate([a[1][1] for a in alone]), atol=1e-11)
    total = jax.tree.map(lambda *leaves: sum(leaves), *(a[1][0] for a in alone))
    assert max(tiny.gradient_errors(d_params, total).values()) < 1e-12
