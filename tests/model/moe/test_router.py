"""Routing and dispatch plans against NumPy loops: values are free, shapes from a short list, since each compiles.

What a batch does is what each of its sequences does alone.
"""

import functools
from typing import NamedTuple

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.model.moe import dispatch as d
from moe_jax.model.moe.router import Routing, route, router_logits
from tests.support import oracles


class Shape(NamedTuple):
    batch: int
    tokens: int
    experts: int
    top_k: int
    capacity: int
    block: int


SHAPES = [
    Shape(2, 5, 4, 2, 2, 3),
    Shape(1, 7, 3, 3, 2, 4),  # K = E
    Shape(3, 4, 5, 1, 1, 2),
    Shape(2, 3, 1, 1, 2, 2),  # E = 1
    Shape(2, 1, 4, 2, 1, 4),  # T = 1
    Shape(1, 6, 4, 2, 6, 128),  # C = T; one block holds all
]
VALUES = st.floats(-250, 250, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 50.0, 90.0, 200.0])


class Plans(NamedTuple):
    routing: Routing
    capacity: d.Plan
    blocks: d.Plan
    further_expert: jax.Array
    blocks_used: jax.Array


@functools.lru_cache
def compiled(shape: Shape):
    def run(logits) -> Plans:
        routing = route(logits, shape.top_k)
        return Plans(routing, d.Capacity(shape.capacity).plan(routing), *d.Blocks(shape.block).plan(routing))

    return jax.jit(run)


@st.composite
def cases(draw):
    shape = draw(st.sampled_from(SHAPES))
    elements = VALUES | st.just(float("nan"))
    logits = draw(hnp.arrays(np.float32, (shape.batch, shape.tokens, shape.experts), elements=elements))
    return shape, logits


def assert_inverse(plan: d.Plan) -> None:
    """Of each sequence: a kept pair is in exactly one row, that row says so, and every other row is empty."""
    pairs = plan.keep[0].size
    for b in range(len(plan.keep)):
        pair, row, keep = (np.asarray(x).reshape(-1) for x in (plan.pair[:, b], plan.row[b], plan.keep[b]))
        assert len(set(row[keep])) == keep.sum()
        assert (row[~keep] == len(pair)).all()
        expected = np.full(len(pair), pairs)
        expected[row[keep]] = np.flatnonzero(keep)
        assert pair.tolist() == expected.tolist()


@settings(max_examples=75, deadline=None)
@given(cases())
def test_routing_and_plans(case: tuple[Shape, np.ndarray]) -> None:
    shape, logits = case
    plans = compiled(shape)(logits)
    routing = plans.routing
    valid = ~np.isnan(logits).any(-1)
    assert (np.asarray(routing.valid) == valid).all()
    rows = np.asarray(plans.capacity.row)
    empty = shape.experts * shape.capacity
    for b in range(shape.batch):
        chosen = [oracles.choose(logits[b, t], shape.top_k) if valid[b, t] else None for t in range(shape.tokens)]
        for t, slots in enumerate(oracles.assign(chosen, shape.capacity)):
            if chosen[t] is None:
                assert np.isnan(routing.gate[b, t]).all()
                assert (rows[b, t] == empty).all()
                continue
            assert routing.expert_index[b, t].tolist() == chosen[t]
            np.testing.assert_allclose(
                routing.gate[b, t], oracles.gates(logits[b, t].astype(np.float64), chosen[t]), atol=2e-6
            )
            expected = [
                empty if slot is None else e * shape.capacity + slot for e, slot in zip(chosen[t], slots, strict=True)
            ]
            assert rows[b, t].tolist() == expected
    pairs = valid.size * shape.top_k
    for plan in (plans.capacity, plans.blocks):
        assert_inverse(plan)
    # Exactly min(n, C) of the n pairs that chose an expert in a sequence are kept.
    chosen = np.asarray(routing.expert_index)
    counts = [[(chosen[b][valid[b]] == e).sum() for e in range(shape.experts)] for b in range(shape.batch)]
    assert np.asarray(plans.capacity.keep).sum() == np.minimum(counts, shape.capacity).sum()
    # The dropless plan is over the whole batch as one sequence. It keeps every pair of a valid token, in a group of its
    # own expert.
    group_expert = np.array([*range(shape.experts), *np.asarray(plans.further_expert)])
    keep = np.asarray(plans.blocks.keep)
    assert keep.shape == (1, valid.size, shape.top_k)
    assert (keep == valid.reshape(1, -1, 1)).all()
    group = np.asarray(plans.blocks.row) // plans.blocks.pair.shape[2]
    assert group_expert[group[keep]].tolist() == chosen.reshape(1, -1, shape.top_k)[keep].tolist()
    # Blocks that hold nothing come last, except an expert's first.
    held = np.flatnonzero((np.asarray(plans.blocks.pair) < pairs).any((1, 2)))
    assert plans.blocks_used == max(shape.experts, *(held + 1), 0)


def test_negative_zero_equals_zero() -> None:
    """XLA's order puts -0.0 below 0.0."""
    logits = jnp.array([[[-0.0, 0.0, -0.0, 0.0]]])
    for top_k in (1, 2, 3):
        assert jax.jit(route, static_argnums=1)(logits, top_k).expert_index.tolist() == [[list(range(top_k))]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_make_a_token_invalid(bad: float) -> None:
    logits = np.zeros((2, 5, 4), np.float32)
    logits[0, 1, 3] = bad
    plans = compiled(SHAPES[0])(logits)
    assert np.flatnonzero(~np.asarray(plans.routing.valid).ravel()).tolist() == [1]
    assert not np.asarray(plans.capacity.keep)[0, 1].any()
    # Without token 1, tokens 0 and 2 of the sequence get the two slots.
    assert np.asarray(plans.capacity.keep)[0].all(-1).tolist() == [True, False, True, False, False]


def test_minus_infinity_is_never_chosen_and_is_no_fault() -> None:
    logits = np.zeros((2, 5, 4), np.float32)
    logits[..., 0] = -np.inf
    routing = compiled(SHAPES[0])(logits).routing
    assert (np.asarray(routing.expert_index) == [1, 2]).all()
    assert np.asarray(routing.valid).all()


@pytest.mark.parametrize(("given_", "expected"), [("bfloat16", "float32"), ("float16", "float32"), ("float32",) * 2])
def test_the_router_is_at_least_float32(given_: str, expected: str) -> None:
    """Inputs of bfloat16 whose logits differ by less than bfloat16 resolves: 1 + 1/256 against 1 rounds to a tie."""
    x = jnp.ones((1, 1, 2), given_)
    kernel = jnp.array([[1.0, 1.0], [0.0, 1 / 512]], jnp.float32)
    logits = router_logits(x, kernel)
    assert logits.dtype == expected
    assert logits[0, 0, 1] - logits[0, 0, 0] == 1 / 512
    assert route(logits, 1).expert_index.tolist() == [[[1]]]
