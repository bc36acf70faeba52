"""What a run saves of its routing at each evaluation: the training pass's own decisions, cut back with the run."""

import functools

import numpy as np

from moe_jax.inference.traced_pass import router_entropy
from moe_jax.inspection.trace import trace_tokens
from moe_jax.training.evaluate import make_tracer
from tests.inspection.test_trace import MODEL, opened
from tests.support import tiny


@functools.cache
def traced(windows: int = 3) -> tuple[np.ndarray, dict]:
    """A stream of three windows and five tokens, and what is saved of it."""
    tokens = tiny.tokens(windows * tiny.T + 5, seed=11)
    tracer = make_tracer(MODEL, opened().graphdef, tokens)
    assert tracer is not None
    return tokens[: windows * tiny.T], tracer(opened().params)


def test_the_saved_choices_are_those_of_the_trace() -> None:
    tokens, saved = traced()
    trace = trace_tokens(opened(), tokens)
    assert saved["tokens"] == tokens.tolist()
    np.testing.assert_array_equal(np.array(saved["expert"]), trace.expert_index.reshape(MODEL.layers, -1))
    np.testing.assert_allclose(saved["drop"], trace.drop_fraction, atol=5e-5)
    np.testing.assert_allclose(saved["entropy"], router_entropy(trace.probs), atol=1e-4)
    np.testing.assert_allclose(saved["load"], trace.load() / (len(tokens) * MODEL.routing.top_k), atol=5e-5)
    assert min(saved["drop"]) > 0.1


def test_entropy_of_known_probabilities() -> None:
    """Half of the tokens certain, half without a clue: 1/2; two of four experts alike: ln 2 / ln 4."""
    certain, even, pair = np.eye(4)[0], np.full(4, 0.25), np.array([0.5, 0.5, 0, 0])
    np.testing.assert_allclose(router_entropy(np.array([[certain, even], [pair, pair]])), [0.5, 0.5])
    np.testing.assert_allclose(router_entropy(np.array([[pair, even]])), [0.75])


def test_a_model_without_routers_saves_none() -> None:
    assert make_tracer(tiny.config(dense="active"), opened().graphdef, tiny.tokens(8)) is None
