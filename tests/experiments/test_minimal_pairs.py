"""Scores of minimal pairs: against logits taken one text at a time, and a table counted by hand."""

import json
from contextlib import nullcontext

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.cli.evaluate import Evaluate
from moe_jax.config import ConfigError, UserError
from moe_jax.data.ngrams import ngram_probabilities
from moe_jax.data.synthetic.minimal_pairs import MinimalPair
from moe_jax.experiments import minimal_pairs
from tests.support import saved_run

TRAIN = ["a cat and a dog met", "a dog met a cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> moe_jax.Run:
    return moe_jax.load_run(saved_run.save_run(tmp_path_factory.mktemp("pairs")))


def scores(run: moe_jax.Run, texts: list[str]) -> np.ndarray:
    step = minimal_pairs.make_score_step(run.graphdef)
    seq_len = run.config.model.seq_len
    return minimal_pairs.text_scores(
        step, run.params, texts, run.tokenizer, seq_len, lambda _: nullcontext(lambda: None)
    )


def test_a_score_is_the_log_probability_of_the_text(run: moe_jax.Run) -> None:
    """17 texts, so that the last batch has one row; of different lengths, so that padding would show."""
    texts = [("a cat met " * 3)[: 1 + n % 12] for n in range(17)]
    expected = []
    for text in texts:
        ids = run.tokenizer.encode(text)
        logs = jax.nn.log_softmax(run.logits(text).astype(np.float64))
        expected.append(float(sum(logs[i, token] for i, token in enumerate(ids))))
    np.testing.assert_allclose(scores(run, texts), expected, rtol=1e-5)


def test_a_story_that_is_too_long_is_said_in_one_line(run: moe_jax.Run) -> None:
    with pytest.raises(UserError, match=r"--pairs: a story has \d+ tokens, and the context of this run 16; name a run"):
        scores(run, ["a cat met a dog " * 20])


def test_an_ngram_score_leaves_the_end_of_the_text_out() -> None:
    texts = ["a cat", "a dog met"]
    found = minimal_pairs.ngram_scores(TRAIN, texts)
    probabilities = ngram_probabilities(TRAIN, texts, minimal_pairs.NGRAM)
    np.testing.assert_allclose(found, [np.log(probabilities[:2]).sum(), np.log(probabilities[3:6]).sum()], rtol=1e-12)


def test_the_table_counts_by_kind_and_by_distance() -> None:
    pairs = [MinimalPair(kind, "", "", n) for kind, n in (("name", 8), ("name", 9), ("object", 8), ("name", 500))]
    model, ngram = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0]), np.array([0.0] * 4 + [1.0] * 4)
    rows = {row.row: (row.pairs, row.model, row.ngram) for row in minimal_pairs.table(pairs, model, ngram)}
    assert rows == {
        "all": (4, 2.5 / 4, 0.0),  # right, wrong, equal, right
        "name": (3, 2 / 3, 0.0),
        "object": (1, 0.5, 0.0),
        "1 to 8 words": (2, 0.75, 0.0),
        "9 to 16 words": (1, 0.0, 0.0),
        "33 words or more": (1, 1.0, 0.0),
    }
    assert {row.ngram for row in minimal_pairs.table(pairs, model, None)} == {None}


def test_the_command_refuses_a_text_and_a_short_context(run: moe_jax.Run) -> None:
    folder = str(run.checkpoint.path.parents[1])
    with pytest.raises(ConfigError, match="--pairs: has texts of its own; leave --data out"):
        Evaluate(run=folder, pairs=True, data="a.txt").execute()
    with pytest.raises(UserError, match="--pairs: a story has"):
        Evaluate(run=folder, pairs=True).execute()


def test_the_command_scores_pairs(
    run: moe_jax.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair of equal scores counts as half right."""
    pairs = [MinimalPair("name", "a cat met", "a cat hat", 3), MinimalPair("object", "a dog ran", "a dog sat", 9)]
    monkeypatch.setattr("moe_jax.data.synthetic.minimal_pairs.minimal_pairs", lambda seed, count: iter(pairs))
    assert Evaluate(run=str(run.checkpoint.path.parents[1]), pairs=True, json=True).execute() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["pairs"]
    own = scores(run, [*(pair.good for pair in pairs), *(pair.bad for pair in pairs)])
    right = np.where(own[:2] == own[2:], 0.5, own[:2] > own[2:])
    assert [row["row"] for row in found] == ["all", "name", "object", "1 to 8 words", "9 to 16 words"]
    assert [row["model"] for row in found] == pytest.approx([right.mean(), *right, *right])
