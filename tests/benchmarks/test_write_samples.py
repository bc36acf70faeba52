"""`benchmarks/write_samples.py`: counts by hand, and the script on a tiny run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import write_samples as samples
from write_samples import distinct, matched_draws, repetition

from moe_jax.cli.main import run_command
from tests.support import saved_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield saved_run.save_run(tmp_path_factory.mktemp("texts"))


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
    assert run_command(["generate", "--run", str(folder), "--prompt", "a cat", "--seed", "1", *limits]) == 0
    quoted = "\n".join(f"> {line}".rstrip() for line in capsys.readouterr().out.strip().splitlines())
    assert f"## a cat … (seed 1)\n\n{quoted}\n" in page.read_text()
