"""The trace: the training step's own decisions, the same ones that a forward pass over a text gives."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import TrainConfig, UserError
from moe_jax.inference.traced_pass import TracedStep
from moe_jax.inspection.trace import make_trace_step, trace_tokens
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.runs.load import LoadedRun
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.state import initial_state
from moe_jax.training.step import make_step
from tests.support import tiny
from tests.support.saved_run import unsaved_run

CONFIG = TrainConfig(steps=10, lr=1e-2, warmup_steps=0, optimizer="adamw")
MODEL = tiny.config()


@functools.cache
def opened() -> LoadedRun:
    return unsaved_run(MODEL)


@functools.cache
def traced() -> TracedStep:
    """One compiled pass a number of windows, for all tests."""
    return make_trace_step(tiny.build(MODEL)[0])


def test_the_forward_pass_decides_as_the_step_does() -> None:
    """Its load and its drops are those that the metrics of the step count."""
    batch = tiny.tokens(1, 2, tiny.T + 1, seed=6)
    graphdef, params = tiny.build(MODEL)
    optimizer = make_optimizer(CONFIG)
    state = initial_state(jax.tree.map(jnp.array, params), optimizer, False)
    _, report = make_step(graphdef, optimizer, CONFIG, False)(state, batch)
    trace = traced()(params, batch[0]).decisions
    chosen = np.stack([(np.asarray(trace.expert_index) == e).mean((1, 2, 3)) for e in range(MODEL.experts)], axis=1)
    np.testing.assert_allclose(chosen, report.metrics.load, rtol=1e-6)
    dropped = 1 - np.asarray(trace.keep).mean()
    assert dropped == pytest.approx(float(report.metrics.drop_fraction), rel=1e-6)
    assert dropped > 0.1


def test_slots_and_drops_by_a_loop_over_the_text() -> None:
    """Tokens in order, their choices best first, take slots while there are some; each window starts anew."""
    trace = trace_tokens(opened(), tiny.tokens(2 * tiny.T + 3, seed=7), traced())
    assert trace.capacity == 2  # ceil(0.5 * 8 * 2 / 4)
    for layer in range(MODEL.layers):
        for i in range(len(trace.tokens)):
            if i % tiny.T == 0:
                queue = [0] * MODEL.experts
            for k, e in enumerate(trace.expert_index[layer, i]):
                assert trace.slot[layer, i, k] == queue[e]
                assert trace.keep[layer, i, k] == (queue[e] < trace.capacity)
                queue[e] += 1
        best = np.argsort(-trace.probs[layer], axis=-1)[:, : MODEL.routing.top_k]
        np.testing.assert_array_equal(trace.expert_index[layer], best)
    np.testing.assert_allclose(trace.gate.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(trace.probs.sum(-1), 1, rtol=1e-6)
    assert (trace.load().sum(1) == len(trace.tokens) * MODEL.routing.top_k).all()


def test_a_longer_text_changes_nothing_before_it_and_padding_does_not_show() -> None:
    tokens = tiny.tokens(tiny.T, seed=8)
    whole = trace_tokens(opened(), tokens, traced())
    for length in (1, 5):
        part = trace_tokens(opened(), tokens[:length], traced())
        assert part.probs.shape == (MODEL.layers, length, MODEL.experts)
        for name in ("probs", "expert_index", "gate", "slot", "keep"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:, :length], err_msg=name)
        assert np.isnan(part.loss[-1])
        np.testing.assert_array_equal(part.loss[:-1], whole.loss[: length - 1])
        (attention,) = part.attention
        np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-6)


def test_the_likeliest_next_tokens_are_those_of_the_logits() -> None:
    """In two windows; the loss is that of the same logits."""
    run, tokens = opened(), tiny.tokens(tiny.T + 3, seed=11)
    trace = trace_tokens(run, tokens, traced())
    model = merge(run.graphdef, run.params)
    whole_pass = jax.jit(lambda window: model.logits(model(window[None], Mode.TRAIN)[0])[0])
    for first in (0, tiny.T):
        window = jnp.asarray(np.pad(tokens[first : first + tiny.T], (0, max(0, first + tiny.T - len(tokens)))))
        logits = np.asarray(whole_pass(window), np.float64)
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for i in range(first, min(first + tiny.T, len(tokens))):
            p = probs[i - first]
            assert trace.next_token[i].tolist() == np.argsort(-p)[:5].tolist()
            np.testing.assert_allclose(trace.next_prob[i], np.sort(p)[::-1][:5], rtol=1e-5)
            if i < len(tokens) - 1:
                assert trace.loss[i] == pytest.approx(-np.log(p[tokens[i + 1]]), rel=1e-4)
    assert repr(trace) == "RoutingTrace(11 tokens, 2 layers, 4 experts)"


def test_a_broken_router_is_named_and_not_drawn() -> None:
    run = opened()
    broken = jax.tree.map(lambda x: x * jnp.nan, run.params)
    run = dataclasses.replace(run, params=broken, checkpoint=SimpleNamespace(step=7))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="step 7 give NaN"):
        trace_tokens(run, tiny.tokens(3), traced())
