"""The numbers of the report, worked by hand: thresholds, limits, what is thinned out and what is left out."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.inspection import corpus_routing, report, trace
from moe_jax.inspection import specialisation as specialised
from moe_jax.inspection.corpus_routing import CorpusRouting, dead_experts
from moe_jax.inspection.specialisation import specialisation
from moe_jax.inspection.trace import RoutingTrace, attention_data
from tests.inspection.test_trace import opened
from tests.support import tiny


def corpus(by_token: Any, by_window: Any, counts: Any, **changes: Any) -> CorpusRouting:
    """One layer. `by_token` [E][V], `by_window` [W][E], `counts` [V]."""
    by_token, by_window, counts = np.array([by_token]), np.array([by_window]), np.array(counts)
    experts, tokens = by_token.shape[1], int(counts.sum())
    values = {"vocab_size": len(counts), "layers": 1, "experts": experts, "top_k": 1, "seq_len": 4}
    return CorpusRouting(
        config=tiny.config(**(values | changes)),
        tokens=tokens,
        by_token=by_token,
        token_counts=counts,
        by_window=by_window,
        together=np.array([np.diag(by_token[0].sum(-1))]),
        flow=np.zeros((0, experts, experts), int),
        entropy=np.ones(1),
        dropped=np.zeros(1),
    )


# The corpus


def test_starved_and_dead_experts() -> None:
    """Loads of 0, 2, 3 and 95 % of four experts are 0, 0.08, 0.12 and 3.8 of the fair load."""
    found = corpus([[0], [2], [3], [95]], [[0, 2, 3, 95]], [100])
    assert dead_experts(found) == [
        {"layer": 0, "expert": 0, "load": 0.0, "dead": True},
        {"layer": 0, "expert": 1, "load": 0.08, "dead": False},
    ]
    exactly = corpus([[10], [90]], [[10, 190]], [200])
    assert [e["expert"] for e in dead_experts(exactly)] == []  # 0.1 of the fair load is not less than 0.1


def test_drops_of_a_factor_by_window() -> None:
    """Windows of 4 tokens and two experts. Factor 0.5: one slot; 2.0: four."""
    found = corpus([[5], [3]], [[4, 0], [1, 3]], [8])
    assert [float(found.drop_fraction(f)[0]) for f in (0.5, 1.0, 1.5, 2.0)] == [5 / 8, 3 / 8, 1 / 8, 0]
    assert found.load.tolist() == [[5 / 8, 3 / 8]]


def test_preferences_are_ordered_bounded_and_summed() -> None:
    """Tokens 0, 1 and 2 choose expert 0 whenever they occur, and token 3 never does."""
    counts = [40, 60, 50, 150]
    found = corpus([[40, 60, 50, 0], [0, 0, 0, 150]], [[150, 150]], counts)
    first, second = specialisation(found)[0]
    assert [t["id"] for t in first["tokens"]] == [1, 2, 0], "the strongest first"
    assert (first["kinds"], first["share"], second["kinds"], second["share"]) == (3, 1.0, 1, 1.0)
    assert first["tokens"][0] == {"id": 1, "here": 60, "all": 60, "times": 2.0, "g2": first["tokens"][0]["g2"]}
    both = specialised.log_likelihood_ratio(np.array([60]), np.array([150]), np.array([60]), 300)
    assert first["tokens"][0]["g2"] == round(float(both[0]), 1)
    few = specialisation(found, most=2)[0][0]
    assert ([t["id"] for t in few["tokens"]], few["kinds"]) == ([1, 2], 3)


@pytest.mark.parametrize(("length", "windows"), [(3, 1), (15, 1), (16, 2), (200, 8)])
def test_a_stream_is_cut_into_windows(length: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T 8. A shorter stream is repeated, a rest is left out, and at most 64 tokens are read, two windows at a time."""
    monkeypatch.setattr(corpus_routing, "CORPUS_TOKENS", 64)
    monkeypatch.setattr(corpus_routing, "tokens_at_once", lambda config: 16)
    seen: list[np.ndarray] = []

    def step(_: Any, rows: np.ndarray) -> Any:
        seen.append(rows)
        shape = (2, *rows.shape)
        probs, index = np.full((*shape, 4), 0.25), np.zeros((*shape, 2), int)
        return SimpleNamespace(decisions=SimpleNamespace(probs=probs, expert_index=index, keep=index == 0))

    monkeypatch.setattr(corpus_routing, "make_traced_pass", lambda _: step)
    tokens = np.arange(length) % tiny.V
    found = corpus_routing.corpus_routing(opened(), tokens)
    assert (found.tokens, found.by_window.shape[1]) == (8 * windows, windows)
    assert {rows.shape for rows in seen} == {(min(2, windows), 8)}
    expected = np.resize(tokens, 8 * windows)
    np.testing.assert_array_equal(found.token_counts, np.bincount(expected, minlength=tiny.V))


# The trace


def traced(tokens: int, **changes: Any) -> RoutingTrace:
    """Two layers of two experts, one choice a token, T 4."""
    config = tiny.config(experts=2, top_k=1, seq_len=4, **changes)
    shape = (2, tokens)
    index = np.zeros((*shape, 1), int)
    index[1, 0] = 1
    keep = np.ones((*shape, 1), bool)
    keep[0, 0] = False
    probs = np.full((*shape, 2), 0.5, np.float32)
    ids = np.arange(tokens)
    pieces = [f"p{i}" for i in ids]
    loss = np.array([*[0.123456] * (tokens - 1), np.nan], np.float32)
    likeliest, chances = np.zeros((tokens, 2), int), np.full((tokens, 2), 0.5, np.float32)
    return RoutingTrace(config, ids, pieces, probs, index, probs[..., :1], index, keep, loss, likeliest, chances, [])


def test_a_long_text_is_refused_and_the_longest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LONGEST", 4)
    seen: list[list[int]] = []
    monkeypatch.setattr(trace, "trace_tokens", lambda _, ids, step: seen.append(ids.tolist()) or traced(len(ids)))
    trace.routing_trace(opened(), "abc")
    assert seen == [[256, 97, 98, 99]]
    with pytest.raises(trace.UserError, match="--text: 5 tokens, at most 4 can be shown"):
        trace.routing_trace(opened(), "abcd")


# The report


def attention(window: np.ndarray) -> Any:
    config = tiny.config(layers=window.shape[0], heads=window.shape[1])
    return attention_data(dataclasses.replace(traced(4), config=config, attention=[window]))


def test_attention_weights_by_hand() -> None:
    """Of token 3: 50, 30, 19 and 1 percent of the tokens 0 to 3. A weight below 2 % is left out."""
    window = np.zeros((1, 1, 4, 4))
    window[0, 0] = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.02, 0.019, 0.961, 0], [0.5, 0.3, 0.19, 0.01]]
    found = attention(window)
    assert (found["heads"], found["tokens"]) == (1, 4)
    assert found["weights"] == [[[[0, 100], [1, 50, 0, 50], [0, 96, 2, 2, 1, 2], [3, 50, 2, 30, 1, 19]]]]


def test_saved_traces_are_compared_with_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two choices a token: every second entry is a first choice. Of two tokens one is sent elsewhere, and then none."""
    experts = {10: [0, 9, 1, 9], 20: [0, 8, 2, 8], 30: [0, 7, 2, 7]}
    saved = [
        {"step": s, "tokens": [97, 98], "expert": [e], "entropy": [s / 100], "drop": [0.5]} for s, e in experts.items()
    ]
    monkeypatch.setattr(report, "read_snapshots", lambda _: saved)
    found = report._traces(tmp_path, opened())
    assert (found["step"], found["same"]) == ([10, 20, 30], [[None, 0.5, 1.0]])
    assert (found["entropy"], found["drop"]) == ([[0.1, 0.2, 0.3]], [[0.5] * 3])
    assert found["shown"] == {"pieces": ["a", "b"], "step": [10, 20, 30], "first": [[[0, 1]], [[0, 2]], [[0, 2]]]}
    monkeypatch.setattr(report, "MOST_TRACES", 2)
    assert report._traces(tmp_path, opened())["shown"]["step"] == [10, 30]
