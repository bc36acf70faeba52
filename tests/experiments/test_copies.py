"""Copies of training text: the suffix automaton beside a search of all passages, and hand-worked cases."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_jax.cli.evaluate import Evaluate
from moe_jax.config import ConfigError, DataConfig
from moe_jax.data.corpora import open_corpus
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer
from moe_jax.experiments import copies
from moe_jax.experiments.suffix_automaton import SuffixAutomaton, longest_copies
from tests.support.saved_run import save_run


def searched(text: Sequence[int], source: Sequence[int]) -> list[int]:
    """For each position, the longest passage that ends there and is in the source: every length is tried."""
    passages = {tuple(source[i:j]) for i in range(len(source)) for j in range(i + 1, len(source) + 1)}
    return [
        max((n for n in range(1, end + 1) if tuple(text[end - n : end]) in passages), default=0)
        for end in range(1, len(text) + 1)
    ]


@pytest.mark.parametrize("symbols", [1, 2, 3, 8])
def test_the_automaton_finds_what_a_full_search_finds(symbols: int) -> None:
    """Few symbols give many repeats, which is where states are split."""
    random = np.random.default_rng(symbols)
    for _ in range(60):
        texts = [random.integers(0, symbols, random.integers(0, 14)).tolist() for _ in range(3)]
        source = random.integers(0, symbols + 1, random.integers(0, 30)).tolist()
        assert longest_copies(texts, source) == [searched(text, source) for text in texts]


def test_the_automaton_has_at_most_two_states_a_token() -> None:
    """2 n - 1 states for n tokens (Blumer et al. 1985); "abbb...b" needs them all, and the root is one of them."""
    for n in (3, 10, 50):
        assert len(SuffixAutomaton([0] + [1] * (n - 1)).length) == 2 * n - 1
        assert len(SuffixAutomaton([0] * n).length) == n + 1


def test_no_passage_goes_over_the_end_of_a_text() -> None:
    assert longest_copies([[1, 2], [3, 4]], [1, 2, 3, 4]) == [[1, 2], [1, 2]]


def test_pieces_have_the_lengths_that_are_asked_for() -> None:
    documents = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    assert copies.pieces_of(documents, [2, 2, 2, 3]) == [[1, 2], [3, 4], [6], [7, 8, 9]]  # the 5 is left out
    assert copies.pieces_of(documents, [2, 6, 6, 6]) == [[1, 2], [6], [7, 8, 9]]
    assert copies.pieces_of(documents, [0, 5]) == [[], [6]]
    assert copies.pieces_of(documents, []) == []


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    data = DataConfig(tokenizer="byte")
    return train_tokenizer(data, open_corpus(data))


def test_a_planted_copy_is_found_and_shown(tokenizer: Tokenizer) -> None:
    """The first text has "the cat sat on" of the training text, the second only "a ", the validation piece "og"."""
    train = np.array(tokenizer.encode("then the cat sat on a dog"), np.uint16)
    texts = [tokenizer.encode(text) for text in ("xx the cat sat onxx", "a a a")]
    own, beside = copies.measure(texts, [tokenizer.encode("qogq")], train, tokenizer)
    assert own == copies.Copies(2, 24, 15, (15 + 3) / 2, " the cat sat on")
    assert own.words == 4
    assert beside == copies.Copies(1, 4, 2, 2, "og")
    assert copies.measure(texts, [], train, tokenizer) == (own, None)


def test_texts_without_any_copy(tokenizer: Tokenizer) -> None:
    own, _ = copies.measure([[1, 2], []], [], np.array([3, 4], np.uint16), tokenizer)
    assert own == copies.Copies(2, 2, 0, 0, "")


def test_the_command_measures_both(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save_run(tmp_path)
    assert Evaluate(run=str(folder), copies=3, json=True).execute() == 0
    said, _, last = capsys.readouterr().out.strip().rpartition("\n")
    found = json.loads(last)["copies"]
    text = (tmp_path / "text.txt").read_text()
    assert found["model"]["texts"] == 3
    assert 0 < found["model"]["longest_tokens"] < 20  # a model with random weights copies nothing
    assert found["model"]["longest_passage"] in text
    assert found["validation"]["longest_passage"] in text
    assert f"{found['model']['longest_tokens']} tokens" in said
    with pytest.raises(ConfigError, match="--copies: has texts of its own; leave --data out"):
        Evaluate(run=str(folder), copies=3, data="a.txt").execute()
    with pytest.raises(ConfigError, match="leave --pairs out"):
        Evaluate(run=str(folder), copies=3, pairs=True).execute()
    with pytest.raises(ConfigError, match="--copies -1: must be between 0"):
        Evaluate(run=str(folder), copies=-1).execute()
