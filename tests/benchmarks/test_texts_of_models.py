"""`benchmarks/copies.py` and `benchmarks/write_samples.py`: counts by hand, and both scripts on a tiny run."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import copies
import numpy as np
import pytest
import write_samples as samples
from write_samples import distinct, matched_draws, repetition

from moe_jax.cli.generate import Generate
from moe_jax.config import DataConfig
from moe_jax.data.corpora import open_corpus
from moe_jax.data.tokenizers import train_tokenizer
from tests.support import saved_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield saved_run.save_run(tmp_path_factory.mktemp("texts"))


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
        assert copies.longest_copies(texts, source) == [searched(text, source) for text in texts]


def test_a_planted_copy_is_found_and_shown() -> None:
    """The first text has "the cat sat on" of the training text, the second only "a ", the validation piece "og"."""
    data = DataConfig(tokenizer="byte")
    tokenizer = train_tokenizer(data, open_corpus(data).documents("train"))
    train = np.array(tokenizer.encode("then the cat sat on a dog"), np.uint16)
    texts = [tokenizer.encode(text) for text in ("xx the cat sat onxx", "a a a")]
    own, beside = copies.measure(texts, [tokenizer.encode("qogq")], train, tokenizer)
    assert own == copies.Copies(2, 24, 15, (15 + 3) / 2, " the cat sat on")
    assert own.words == 4
    assert beside == copies.Copies(1, 4, 2, 2, "og")
    assert copies.measure(texts, [], train, tokenizer) == (own, None)


@pytest.mark.slow
def test_copies_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copies.run(["--run", str(folder), "--texts", "3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = (folder.parent / "text.txt").read_text()
    assert result["model"]["texts"] == 3
    assert 0 < result["model"]["longest_tokens"] < 20  # a model with random weights copies nothing
    assert result["model"]["longest_passage"] in text
    assert result["validation"]["longest_passage"] in text


def test_repetition_is_within_a_text_and_distinct_over_all_texts() -> None:
    """a b a b a: the pairs ab ba ab ba, two of which stood there before. The second text has the pair ab for itself.
    Of the distinct: two words of four; one pair of two, and none goes from one text to the next."""
    assert [repetition(texts, 2) for texts in (["ababa"], ["ababa", "ab"])] == [0.5, 1 - (2 + 1) / (4 + 1)]
    assert [repetition([text], 4) for text in ("aaaa", "aaaaa")] == [0, 0.5]
    assert [distinct(["ab", "ab"], n) for n in (1, 2)] == [0.5, 0.5]
    assert distinct(["ab", "ba"], 2) == 1


def test_draws_have_the_lengths_of_the_texts_and_share_no_story() -> None:
    """Lengths 3 and 1. First draw: the first story of at least 3 words is abcd, cut; then the first left, ef. Second:
    ghi, then j. Third: klmno, and nothing is left for the 1."""
    stories = ["ef", "abcd", "ghi", "j", "klmno"]
    assert matched_draws(["xxx", "x"], stories, 9) == [["abc", "e"], ["ghi", "j"]]
    assert matched_draws(["xxx", "x"], stories, 1) == [["abc", "e"]]
    assert matched_draws(["x" * 9], stories, 9) == []


@pytest.mark.slow
def test_the_page_has_the_texts_of_generate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "PROMPTS", ("a cat",))
    page, limits = tmp_path / "page.md", ["--max-tokens", "12", "--temperature", "0.5"]
    assert samples.run(["--run", str(folder), "--out", str(page), "--texts", "2", *limits]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == set(samples.MEASURES)
    Generate(run=str(folder), prompt="a cat", seed=1, max_tokens=12, temperature=0.5).execute()
    quoted = "\n".join(f"> {line}".rstrip() for line in capsys.readouterr().out.strip().splitlines())
    assert f"## a cat … (seed 1)\n\n{quoted}\n" in page.read_text()
