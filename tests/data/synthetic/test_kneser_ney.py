"""Modified Kneser-Ney against loops over dictionaries, and by its properties."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from moe_jax.data.synthetic import kneser_ney
from moe_jax.data.synthetic.kneser_ney import kneser_ney_bits_per_byte, kneser_ney_probabilities
from moe_jax.data.synthetic.stories import generate
from moe_jax.data.synthetic.trigram import END, spelling_probability, trigram_bits_per_byte, words_of

TRAIN = [*generate(3, "train", 30)]
VALID = [*generate(3, "valid", 4), "Zyx wept."]


class Loops:
    """The formula of the module's docstring, one probability at a time."""

    def __init__(self, stories: list[str], order: int) -> None:
        words = [[*[END] * (order - 1), *words_of(story), END] for story in stories]
        counts = Counter(tuple(w[i : i + order]) for w in words for i in range(len(w) - order + 1))
        self.levels = [counts]
        while order > 1:
            counts = Counter(ngram[1:] for ngram in counts)
            self.levels.insert(0, counts)
            order -= 1
        self.followers = []
        for level in self.levels:
            found = defaultdict(list)
            for ngram, count in level.items():
                found[ngram[:-1]].append(count)
            self.followers.append(found)

    def discount(self, level: int, count: int) -> float:
        n = Counter(self.levels[level].values())
        k = min(count, 3)
        y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
        found = k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0
        return found if found > 0 else y

    def probability(self, ngram: tuple[str, ...]) -> float:
        if not ngram:
            raise ValueError
        level = len(ngram) - 1
        lower = self.probability(ngram[1:]) if level else spelling_probability(ngram[-1])
        followers = self.followers[level].get(ngram[:-1], [])
        if not followers:
            return lower
        count = self.levels[level][ngram]
        kept = max(count - self.discount(level, count), 0) if count else 0
        saved = sum(self.discount(level, c) for c in followers)
        return (kept + saved * lower) / sum(followers)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_every_probability_is_that_of_the_loops(order: int) -> None:
    loops = Loops(TRAIN, order)
    expected = []
    for story in VALID:
        words = [*[END] * (order - 1), *words_of(story), END]
        expected += [loops.probability(tuple(words[i : i + order])) for i in range(len(words) - order + 1)]
    np.testing.assert_allclose(kneser_ney_probabilities(TRAIN, VALID, order), expected, rtol=1e-12)


def test_the_probabilities_of_all_words_sum_to_one() -> None:
    """After a known context and after a new one. Words of the text have all of it but for the spelling of new words."""
    known = sorted({END, *(word for story in TRAIN for word in words_of(story))})
    loops = Loops(TRAIN, 3)
    for context in ((END, END), tuple(words_of(TRAIN[0])[:2]), ("Zyx", " wept")):
        total = sum(loops.probability((*context, word)) for word in known)
        spelled = sum(spelling_probability(word) for word in known)
        unknown = loops.probability((*context, "qqqq")) / spelling_probability("qqqq")  # share that goes to spelling
        assert total + unknown * (1 - spelled) == pytest.approx(1, abs=1e-12)


def test_many_words_are_packed_without_overflow() -> None:
    """Five words of a vocabulary of 10 million do not fit into 63 bits."""
    rows = np.array([[9_999_999] * 5, [9_999_998] * 5, [9_999_999] * 5, [0, 0, 0, 0, 1]])
    packed = kneser_ney._packed(rows, 10**7)
    assert packed[0] == packed[2]
    assert len(set(packed.tolist())) == 3


def test_no_word_has_probability_zero() -> None:
    """ "a" has one follower, three times. Few n-grams occur three times and many four times, so that the formula of the
    third discount is negative. Without a discount, "b" would have probability 0 after "a"."""
    stories = ["a w"] * 3 + [f"b {second}" for second in "wxyz" for _ in range(4)]
    assert (kneser_ney_probabilities(stories, ["a b", "b a", "q"], 2) > 0).all()


def test_it_is_a_stronger_baseline_than_the_trigram() -> None:
    train, valid = list(generate(0, "train", 600)), list(generate(0, "valid", 60))
    trigram, five = trigram_bits_per_byte(train, valid), kneser_ney_bits_per_byte(train, valid)
    assert five < trigram
