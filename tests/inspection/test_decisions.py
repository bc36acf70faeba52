"""Decisions on a long text: what is written is what the model chooses, and the counts agree with counting by hand."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.cli.main import run_command
from moe_jax.config import ConfigError
from moe_jax.inspection import decisions as module
from moe_jax.inspection.decisions import Decisions, count_decisions, decisions, write_decisions
from moe_jax.model.moe.layer import LayerTrace, Mode
from moe_jax.model.transformer import merge
from moe_jax.runs.load import LoadedRun
from tests.inspection.test_trace import MODEL, opened
from tests.support import tiny

TOKENS = tiny.tokens(3 * tiny.T + 3, seed=3)


@functools.cache
def forward() -> list[Decisions]:
    return list(decisions(opened(), TOKENS))


def test_the_decisions_are_those_of_evaluation_window_by_window() -> None:
    """The run has slots for half of the pairs, so a pass with drops would decide otherwise in its second layer."""
    run = opened()

    @functools.partial(jax.jit, static_argnames="mode")
    def trace(params: nnx.State, tokens: jax.Array, mode: Mode) -> LayerTrace:
        return merge(run.graphdef, params)(tokens, mode, trace=True)[1].trace

    made = forward()
    assert [part.first for part in made] == [*range(0, len(TOKENS), tiny.T)]
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in made]), TOKENS)
    dropped = False
    for part in made:
        evaluated, trained = (trace(run.params, part.tokens[None], mode) for mode in (Mode.EVALUATE, Mode.TRAIN))
        np.testing.assert_array_equal(part.expert, evaluated.expert_index[:, 0])
        np.testing.assert_allclose(part.gate, evaluated.gate[:, 0], rtol=1e-5)
        dropped |= not np.array_equal(part.expert, trained.expert_index[:, 0])
    assert dropped


def by_hand(run: LoadedRun, tokens: np.ndarray) -> Iterator[Decisions]:
    """Two layers, three experts, two choices, four tokens, in two parts."""
    del run, tokens
    yield Decisions(0, np.array([5, 6]), np.array([[[0, 1], [1, 0]], [[2, 0], [2, 1]]]), np.zeros((2, 2, 2)))
    yield Decisions(2, np.array([5, 7]), np.array([[[0, 2], [1, 0]], [[2, 1], [2, 1]]]), np.zeros((2, 2, 2)))


def test_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "decisions", by_hand)
    run = opened()
    model = dataclasses.replace(MODEL, experts=3)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    counts = count_decisions(run, np.array([5, 6, 5, 7]), np.array([0, 0, 1, 1]), ["a", "b"])
    np.testing.assert_array_equal(counts.by_kind, [[[2, 2, 0], [1, 1, 2]], [[2, 1, 1], [0, 2, 2]]])
    np.testing.assert_array_equal(
        counts.together, [[[4, 3, 1], [3, 3, 0], [1, 0, 1]], [[1, 0, 1], [0, 3, 3], [1, 3, 4]]]
    )
    np.testing.assert_array_equal(counts.first_seen, [[0, 0, 2], [0, 1, 0]])
    assert [counts.hot_set(n) for n in (0, 1, 2, 3, 100)] == [0, 4 / 6, 5 / 6, 1, 1]
    np.testing.assert_allclose(counts.coactivation()[0], [[1, 3 / 4, 1 / 4], [1, 1, 0], [1, 0, 1]])
    np.testing.assert_allclose(counts.specialisation()[0, 0], [1 / 2, 1 / 2, 0])
    assert counts.to_json()["hot_set"] == [[1, 0.66667], [4, 1.0]]
    assert counts.to_json()["load"] == [[0.5, 0.375, 0.125], [0.125, 0.375, 0.5]]
    told = "\n".join(counts.describe())
    assert "66.7% after 1, 100.0% after 4" in told
    assert "a: expert 0 of layer 0 has 1.5 times an even share" in told


def test_what_is_written(tmp_path: Path) -> None:
    out = tmp_path / "made" / "trace.npz"
    counts = write_decisions(
        opened(), [("a", TOKENS[:9].tolist()), ("b", TOKENS[9:20].tolist()), ("a", TOKENS[20:].tolist())], out
    )
    read = np.load(out)
    assert read["gate"].dtype == np.float32
    np.testing.assert_array_equal(read["token"], TOKENS)
    np.testing.assert_array_equal(read["expert"], np.concatenate([p.expert for p in forward()], 1).swapaxes(0, 1))
    gate = np.concatenate([part.gate for part in forward()], 1).swapaxes(0, 1)
    np.testing.assert_allclose(read["gate"], gate, atol=1e-5)
    assert counts.kinds == ["a", "b"]
    assert counts.by_kind[1].sum() == 11 * MODEL.layers * MODEL.routing.top_k
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_the_files_of_a_folder_are_kinds(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "folder").mkdir()

    argv = ["inspect", "--run", "nano", "--file", str(tmp_path), "--trace", str(tmp_path / "out" / "trace.npz")]
    assert run_command([*argv, "--json", str(tmp_path / "out" / "counts.json")]) == 0
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert list(counts["specialisation"]) == ["a", "b"]
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"^--file .*: must be a text in UTF-8"):
        run_command(argv)
    with pytest.raises(ConfigError, match=r"^--trace t\.jsonl: must end in \.npz"):
        run_command([*argv[:-1], "t.jsonl"])
