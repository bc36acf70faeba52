"""The scores to compare a model with; modified Kneser-Ney against its formula, and by its properties."""

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from moe_jax.config import DataConfig
from moe_jax.data import baselines
from moe_jax.data.baselines import (
    END,
    CorpusBaselines,
    NgramModel,
    corpus_baselines,
    ngrams,
    spelling_probability,
    words_of,
)
from moe_jax.data.synthetic import stories
from moe_jax.data.synthetic.stories import generate
from moe_jax.data.token_store import TokenStore, prepare_token_store
from tests.support.grammar import code_length_bits

TRAIN, VALID = ["the cat sat. the dog sat.", "the cat ran."] * 5, ["the cat sat.", "the dog ran."]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> tuple[DataConfig, TokenStore]:
    for name, documents in (("train", TRAIN), ("valid", VALID)):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(documents))
    data = DataConfig(source=str(tmp_path), vocab_size=270)
    return data, prepare_token_store(data, progress=False)


def scored(train: Iterable[str], valid: list[str]) -> CorpusBaselines:
    return CorpusBaselines(NgramModel(train, 3).bits_per_byte(valid))


def test_any_text_has_its_trigram_model(text: tuple[DataConfig, TokenStore], cache: Path) -> None:
    """By its stored tokens: a data set of the hub is scored without a network."""
    data, store = text
    for path in Path(data.source).glob("*.txt"):
        path.unlink()
    scores = corpus_baselines(data, store)
    assert scores == scored(TRAIN, VALID)
    assert scores.entropy_floor is None
    assert "the best possible" not in scores.describe()
    (kept,) = (cache / "baselines").iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"trigram": 9.5}))
    assert corpus_baselines(data, store).trigram == 9.5


def test_the_embedded_stories_have_a_floor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "VALIDATION_STORIES", 30)
    data = DataConfig(stories=60, tokenizer="byte")
    store = prepare_token_store(data, progress=False)
    found = corpus_baselines(data, store)
    valid = list(generate(0, "valid", 30))
    bits = math.fsum(map(code_length_bits, valid))
    assert dataclasses.replace(found, entropy_floor=None) == scored(generate(0, "train", 60), valid)
    assert found.entropy_floor == bits / sum(len(story.encode()) for story in valid)
    assert found.entropy_floor < found.trigram
    assert found.describe().startswith(f"the best possible is {found.entropy_floor:.4f}")


def test_a_long_text_is_counted_and_scored_in_its_beginning(text: tuple[DataConfig, TokenStore], monkeypatch) -> None:
    monkeypatch.setattr(baselines, "TRAIN_BYTES", 30)
    monkeypatch.setattr(baselines, "VALID_BYTES", 12)
    assert corpus_baselines(*text) == scored(TRAIN[:1], VALID[:1])


# The n-gram models

COUNTED = [*generate(3, "train", 30)]
SCORED = [*generate(3, "valid", 4), "Zyx wept."]


class Formula:
    """The formula of the module's docstring, with lists of followers in place of sums."""

    def __init__(self, documents: list[str], order: int) -> None:
        words = [[*[END] * (order - 1), *words_of(story), END] for story in documents]
        counts = Counter(tuple(w[i : i + order]) for w in words for i in range(len(w) - order + 1))
        self.levels = {order: counts}
        for length in range(order - 1, 0, -1):
            counts = self.levels[length] = Counter(ngram[1:] for ngram in counts)
        self.followers = {length: defaultdict(list) for length in self.levels}
        for length, level in self.levels.items():
            for ngram, count in level.items():
                self.followers[length][ngram[:-1]].append(count)
        self.repeated = {length: Counter(level.values()) for length, level in self.levels.items()}

    def discount(self, length: int, count: int) -> float:
        n = self.repeated[length]
        k = min(count, 3)
        y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
        found = k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0
        return found if found > 0 else y

    def probability(self, ngram: tuple[str, ...]) -> float:
        length = len(ngram)
        lower = self.probability(ngram[1:]) if length > 1 else spelling_probability(ngram[-1])
        followers = self.followers[length].get(ngram[:-1], [])
        if not followers:
            return lower
        count = self.levels[length][ngram]
        kept = max(count - self.discount(length, count), 0) if count else 0
        return (kept + sum(self.discount(length, c) for c in followers) * lower) / sum(followers)


@pytest.mark.parametrize("order", [1, 3])
def test_every_probability_is_that_of_the_formula(order: int) -> None:
    model, formula = NgramModel(COUNTED, order), Formula(COUNTED, order)
    for ngram in (ngram for story in SCORED for ngram in ngrams(story, order)):
        assert model.probability(ngram) == pytest.approx(formula.probability(ngram), rel=1e-12)


def test_the_probabilities_of_all_words_sum_to_one() -> None:
    """After a known context and after a new one. Words of the text have all of it but for the spelling of new words."""
    known = sorted({END, *(word for story in COUNTED for word in words_of(story))})
    model = NgramModel(COUNTED, 3)
    for context in ((END, END), tuple(words_of(COUNTED[0])[:2]), ("Zyx", " wept")):
        total = sum(model.probability((*context, word)) for word in known)
        spelled = sum(spelling_probability(word) for word in known)
        unknown = model.probability((*context, "qqqq")) / spelling_probability("qqqq")  # share that goes to spelling
        assert total + unknown * (1 - spelled) == pytest.approx(1, abs=1e-12)


def test_a_score_worked_by_hand() -> None:
    """Words "a" 2, "b" 1, end 3 (of 6). Counts 1, 2, 3 occur once each, 4 never: Y = 1/3, D1 = 1/3, D2 = 1, D3 = 3.

    P("a") = (2 - 1 + (1/3 + 1 + 3) / 257^2) / 6 and P(end) = (3 - 3 + (1/3 + 1 + 3) / 257) / 6.
    """
    share = (1 / 3 + 1 + 3) / 6
    a, end = 1 / 6 + share * 257.0**-2, share / 257
    assert NgramModel(["a", "a", "b"], 1).bits_per_byte(["a"]) == pytest.approx(-math.log2(a * end))
