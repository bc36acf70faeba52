"""The page of samples: its stories are those of `generate`, its measures those of the model's and the run's text."""

import json
from pathlib import Path

import pytest

from moe_jax.cli.generate import Generate
from moe_jax.cli.samples import Samples
from moe_jax.data.streams import stored_documents
from moe_jax.experiments import samples
from moe_jax.experiments.text_statistics import words
from moe_jax.inference.generate import TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.runs.load import open_run
from tests.support import saved_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield saved_run.save_run(tmp_path_factory.mktemp("samples"))


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "PROMPTS", ("a cat", "the dragon"))
    assert Samples(run=str(folder), stories=2, max_tokens=12, temperature=0.5).execute() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["step"], result["stories"], result["temperature"]) == (saved_run.STEP, 2, 0.5)
    for name in samples.MEASURES:
        assert set(result[name]) == {"model", "text_mean", "text_range", "draws"}
    page = (tmp_path / "benchmarks" / "samples" / "run.md").read_text()
    assert f"samples --run {folder} --stories 2 --temperature 0.5 --max-tokens 12" in page
    assert page.count("\n## ") == 2 * len(samples.SEEDS)
    for prompt in ("a cat", "the dragon"):
        Generate(run=str(folder), prompt=prompt, seed=1, max_tokens=12, temperature=0.5).execute()
        told = capsys.readouterr().out.strip().splitlines()
        quoted = "\n".join(f"> {line}".rstrip() for line in told)
        assert f"## {prompt} … (seed 1)\n\n{quoted}\n" in page


def test_stories_of_one_seed_differ_by_their_number(folder: Path) -> None:
    run = open_run(folder)
    generator = TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len)

    def tell(**which: int) -> str:
        return samples.write_text(generator, "a cat", Sampling(), limit=12, **which)

    assert tell(seed=0, number=1) == tell(seed=0, number=1)
    assert len({tell(seed=0), tell(seed=0, number=1), tell(seed=1)}) == 3
    assert tell(seed=0).startswith("a cat")


def test_the_text_is_the_runs_validation_text(folder: Path) -> None:
    """Of 60 stories the last 5 % validate."""
    run = open_run(folder)
    stories = list(stored_documents(run.validation_text().store.valid.tokens, run.tokenizer))
    assert stories == [f"{saved_run.STORY}{i}" for i in (57, 58, 59)]


def test_measures_are_of_texts_of_equal_length() -> None:
    """The model says a b a b a b a, of whose four 4-grams two are new. Two validation stories are long enough; cut to
    seven words, one is all different and the other all the same. Of distinct words: 2, 7 and 1 of 7."""
    stories = ["one two three four five six seven eight", "short", "no " * 30]
    measured = samples.measure(["a b a b a b a"], iter(stories))
    assert measured["repetition_4"].model == 0.5
    assert measured["repetition_4"].text == (0, 0.75)
    assert measured["distinct_1"].model == 2 / 7
    assert measured["distinct_1"].text == (1, 1 / 7)
    row = measured["distinct_1"].to_json()
    assert (row["text_mean"], row["text_range"], row["draws"]) == (pytest.approx(4 / 7), [1 / 7, 1], 2)
    assert len(words(stories[0])) == 8


def test_only_beginnings_are_measured() -> None:
    """A story of 100 different words and then one word for ever repeats nothing in its beginning, and a validation
    story of 100 words is long enough for it."""
    own = " ".join(f"w{i}" for i in range(100))
    measured = samples.measure([own + " and" * 500], iter([own]))
    assert (measured["repetition_4"].model, measured["repetition_4"].text) == (0, (0,))
    assert measured["distinct_1"].model == 1


def test_a_text_that_is_too_short_is_said_to_be() -> None:
    measured = samples.measure(["a b c d e"], iter(["a b"]))
    assert measured["distinct_1"].to_json() == {"model": 1, "text_mean": None, "text_range": None, "draws": 0}
    assert "too short to say" in samples.to_markdown("x", [], measured, [])


def test_a_text_shorter_than_an_n_gram_gives_no_nan() -> None:
    """The JSON line held NaN, which is no JSON: the draws are as short as the text."""
    measured = samples.measure(["two words"], iter(["one two three four"] * 3))
    values = {name: m.to_json() for name, m in measured.items()}
    json.dumps(values, allow_nan=False)
    assert values["distinct_3"] == {"model": None, "text_mean": None, "text_range": None, "draws": 0}
    assert "too short to say" in samples.to_markdown("t", [], measured, [])
