"""What a run saves of its routing at each evaluation: the training pass's own decisions, cut back with the run."""

import functools
from pathlib import Path

import numpy as np

from moe_jax.inference.traced_pass import router_entropy
from moe_jax.inspection.trace import trace_tokens
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.load import open_run
from moe_jax.runs.records import read_snapshots
from moe_jax.training.evaluate import make_tracer
from tests.inspection.test_trace import MODEL, opened
from tests.support import saved_run, tiny


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


def test_what_came_after_a_checkpoint_is_forgotten(tmp_path: Path) -> None:
    folder, saved = RunFolder(tmp_path), traced()[1]
    for step in (10, 20, 30):
        folder.add_trace(step, saved)
    assert [trace["step"] for trace in read_snapshots(tmp_path)] == [10, 20, 30]
    folder.truncate_logs_after(25, 20)
    assert [trace["step"] for trace in read_snapshots(tmp_path)] == [10, 20]
    assert read_snapshots(tmp_path)[0] == {"step": 10} | saved
    (tmp_path / "other").mkdir()
    run = open_run(saved_run.save_run(tmp_path / "other"))
    folder.start(run.config, run.tokenizer, [])
    assert read_snapshots(tmp_path) == []
