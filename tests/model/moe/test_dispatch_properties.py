"""An MoE layer of free logits against loops: the output and every gradient, under drops, ties and far logits.

The shapes come from a short list, since each compiles; the values are drawn freely.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.model.moe import dispatch as d
from moe_jax.model.moe.router import route
from tests.support import oracles, tiny

WIDTH, HIDDEN = 3, 2


class Shape(NamedTuple):
    batch: int
    tokens: int
    experts: int
    top_k: int
    capacity: int


SHAPES = [
    Shape(2, 6, 4, 2, 2),
    Shape(1, 7, 3, 3, 2),  # K = E
    Shape(3, 5, 5, 1, 1),
    Shape(2, 4, 1, 1, 2),  # E = 1
    Shape(2, 1, 4, 2, 1),  # T = 1
    Shape(2, 6, 4, 2, 6),  # C = T: nothing is dropped
]


def network(rows: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    return jnp.einsum("gbra,gad->gbrd", jnp.tanh(jnp.einsum("gbrd,gda->gbra", rows, w_in)), w_out)


@functools.lru_cache
def compiled(shape: Shape):
    """(ours, plain), each from operands and a cotangent to the output and the gradients of all four operands."""

    def ours(x, logits, w_in, w_out):
        routing = route(logits, shape.top_k)
        plan = d.Capacity(shape.capacity).plan(routing)
        rows = network(d.dispatch(x, plan), w_in, w_out)
        return d.combine(d.gated(rows, d.row_gates(routing.gate, plan)), plan)

    def plain(x, logits, w_in, w_out, chosen, kept):
        """All experts on all tokens; `chosen` and `kept` `[B, T, E]` are the loops' decisions, 0 or 1."""
        hidden = jnp.tanh(jnp.einsum("btd,edf->btef", x, w_in))
        p = jax.nn.softmax(logits, axis=-1)
        if shape.top_k > 1:  # the softmax over the chosen logits alone; far logits must not give 0 / 0
            p = jax.nn.softmax(jnp.where(chosen > 0, logits, -jnp.inf), axis=-1)
        return jnp.einsum("bte,btef,efd->btd", p * kept, hidden, w_out)

    def with_gradients(function):
        def run(operands, cotangent, *decisions):
            y, pull = jax.vjp(lambda *a: function(*a, *decisions), *operands)
            return y, pull(cotangent)

        return jax.jit(run)

    return with_gradients(ours), with_gradients(plain)


@st.composite
def cases(draw) -> tuple[Shape, tuple[np.ndarray, ...], np.ndarray]:
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(shape.batch, shape.tokens, shape.experts))
    kind = draw(st.sampled_from(["usual", "flat", "tied", "far", "one expert", "few values"]))
    if kind == "flat":
        logits *= 1e-3
    elif kind == "tied":
        logits[:] = 0
    elif kind == "far":
        logits = rng.choice([0.0, 50.0, 90.0, 200.0], logits.shape)
    elif kind == "one expert":
        logits[..., draw(st.integers(0, shape.experts - 1))] += 20
    elif kind == "few values":
        logits = np.round(logits)
    w_in = rng.normal(size=(shape.experts, WIDTH, HIDDEN))
    w_out = rng.normal(size=(shape.experts, HIDDEN, WIDTH))
    x, cotangent = rng.normal(size=(2, shape.batch, shape.tokens, WIDTH))
    return shape, (x, logits + 0.0, w_in, w_out), cotangent


def decisions(shape: Shape, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen, kept = np.zeros((2, *logits.shape))
    for b in range(shape.batch):
        choices = [oracles.choose(z, shape.top_k) for z in logits[b]]
        for t, slots in enumerate(oracles.assign(choices, shape.capacity)):
            for e, slot in zip(choices[t], slots, strict=True):
                chosen[b, t, e] = 1
                kept[b, t, e] = slot is not None
    return chosen, kept


@settings(max_examples=100, deadline=None)
@given(cases())
def test_layer_against_loops(case: tuple[Shape, tuple[np.ndarray, ...], np.ndarray]) -> None:
    shape, operands, cotangent = case
    with jax.enable_x64(True):
        ours, plain = compiled(shape)
        y, gradients = ours(operands, cotangent)
        chosen, kept = decisions(shape, operands[1])
        expected: tuple[Any, Any] = plain(operands, cotangent, chosen, kept)
        assert tiny.relative_error(y, expected[0], floor=1e-6) < 1e-12
        errors = tiny.gradient_errors(gradients, expected[1])
        # No gradient is measured finer than 1e-5 of the largest, of which float64 knows 2e-11.
        assert max(errors.values()) < 1e-10, errors
        # A token with no slot at all: exactly nothing comes out, and nothing flows back to it.
        lost = kept.sum(-1) == 0
        assert (np.asarray(y)[lost] == 0).all()
        assert (np.asarray(gradients[0])[lost] == 0).all()
