"""`benchmarks/minimal_pairs.py`: the grammar can write only the good text, and scores are those of the logits."""

import json
import random
from pathlib import Path

import jax
import minimal_pairs
import numpy as np
import pytest
from minimal_pairs import FORMS, KINDS, MinimalPair, pairs_of

import moe_jax
from moe_jax.config import UserError
from moe_jax.data.synthetic import stories
from tests.support import saved_run
from tests.support.grammar import code_length_bits

KNOWN = {*KINDS, *FORMS.values(), "knowledge"}


def test_the_grammar_can_write_the_good_text_only() -> None:
    for i in range(12):
        story = stories.sample(3, "valid", i)
        found = list(pairs_of(story, random.Random(0)))
        assert len(found) > 8
        for pair in found:
            assert story.text.startswith(pair.good)
            assert code_length_bits(pair.bad + story.text[len(pair.good) :]) == float("inf"), pair


def test_all_kinds_come_up_and_the_pairs_are_a_function_of_the_seed() -> None:
    pairs = list(minimal_pairs.minimal_pairs(0, 400))
    assert {pair.kind for pair in pairs} == KNOWN
    assert pairs == list(minimal_pairs.minimal_pairs(0, 400))
    assert pairs != list(minimal_pairs.minimal_pairs(1, 400))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> moe_jax.Run:
    return moe_jax.load_run(saved_run.save_run(tmp_path_factory.mktemp("pairs")))


def scores(run: moe_jax.Run, texts: list[str]) -> np.ndarray:
    step = minimal_pairs.make_score_step(run.graphdef)
    return minimal_pairs.text_scores(step, run.params, texts, run.tokenizer, run.config.model.seq_len)


@pytest.mark.slow
def test_a_score_is_the_log_probability_of_the_text(run: moe_jax.Run) -> None:
    """17 texts, so that the last batch has one row; of different lengths, so that padding would show."""
    texts = [("a cat met " * 3)[: 1 + n % 12] for n in range(17)]
    expected = []
    for text in texts:
        ids = run.tokenizer.encode(text)
        logs = jax.nn.log_softmax(run.logits(text).astype(np.float64))
        expected.append(float(sum(logs[i, token] for i, token in enumerate(ids))))
    np.testing.assert_allclose(scores(run, texts), expected, rtol=1e-5)


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


@pytest.mark.slow
def test_the_script(run: moe_jax.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A pair of equal scores counts as half right. The pairs of the corpus are longer than this run's context."""
    folder = str(Path(run.checkpoint.path).parents[1])
    with pytest.raises(UserError, match=r"a story has \d+ tokens, and the context of this run 16"):
        minimal_pairs.run(["--run", folder])
    pairs = [MinimalPair("name", "a cat met", "a cat hat", 3), MinimalPair("object", "a dog ran", "a dog sat", 9)]
    monkeypatch.setattr(minimal_pairs, "minimal_pairs", lambda seed, count: iter(pairs))
    assert minimal_pairs.run(["--run", folder]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["pairs"]
    own = scores(run, [*(pair.good for pair in pairs), *(pair.bad for pair in pairs)])
    right = np.where(own[:2] == own[2:], 0.5, own[:2] > own[2:])
    assert [row["model"] for row in rows] == pytest.approx([right.mean(), *right, *right])
