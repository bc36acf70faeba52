"""Modified Kneser-Ney against loops over dictionaries, and by its properties."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data import ngrams
from moe_jax.data.ngrams import END, ngram_bits_per_byte, ngram_probabilities, spelling_probability, words_of
from moe_jax.data.synthetic.stories import generate

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

        self.repeated = [Counter(level.values()) for level in self.levels]

    def discount(self, level: int, count: int) -> float:
        n = self.repeated[level]
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
    np.testing.assert_allclose(ngram_probabilities(TRAIN, VALID, order), expected, rtol=1e-12)


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
    packed = ngrams._packed(rows, 10**7)
    assert packed[0] == packed[2]
    assert len(set(packed.tolist())) == 3


def test_no_word_has_probability_zero() -> None:
    """ "a" has one follower, three times. Few n-grams occur three times and many four times, so that the formula of the
    third discount is negative. Without a discount, "b" would have probability 0 after "a"."""
    stories = ["a w"] * 3 + [f"b {second}" for second in "wxyz" for _ in range(4)]
    assert (ngram_probabilities(stories, ["a b", "b a", "q"], 2) > 0).all()


def test_the_scores_of_all_orders_are_those_of_each() -> None:
    scores = ngram_bits_per_byte(TRAIN, VALID, (1, 3, 5))
    size = sum(len(text.encode()) for text in VALID)
    for order, score in zip((1, 3, 5), scores, strict=True):
        assert score == pytest.approx(-np.log2(ngram_probabilities(TRAIN, VALID, order)).sum() / size)


def test_more_words_before_are_a_stronger_baseline() -> None:
    train, valid = list(generate(0, "train", 600)), list(generate(0, "valid", 60))
    one, three, five = ngram_bits_per_byte(train, valid, (1, 3, 5))
    assert five < three < 0.7 * one


def test_a_score_worked_by_hand() -> None:
    """Words "a" 2, "b" 1, end 3 (of 6). Counts 1, 2, 3 occur once each, 4 never: Y = 1/3, D1 = 1/3, D2 = 1, D3 = 3.

    P("a") = (2 - 1 + (1/3 + 1 + 3) / 257^2) / 6 and P(end) = (3 - 3 + (1/3 + 1 + 3) / 257) / 6.
    """
    share = (1 / 3 + 1 + 3) / 6
    a, end = 1 / 6 + share * 257.0**-2, share / 257
    (score,) = ngram_bits_per_byte(["a", "a", "b"], ["a"], (1,))
    assert score == pytest.approx(-math.log2(a * end))


@given(st.text())
def test_words_joined_are_the_text(text: str) -> None:
    assert "".join(words_of(text)) == text


def test_words_keep_the_space_before_them() -> None:
    expected = ['"', "Oh", ",", " my", " ", " cat", "!", '"', " said", " Tom", "."]
    assert words_of('"Oh, my  cat!" said Tom.') == expected


def test_spelling_sums_to_one_over_all_byte_strings() -> None:
    """256^n strings of n bytes: the sum up to n is 1 - (256/257)^(n+1), which goes to 1."""
    for n in range(4):
        total = math.fsum(256**k * spelling_probability("x" * k) for k in range(n + 1))
        assert total == pytest.approx(1 - (256 / 257) ** (n + 1))
    assert spelling_probability("é") == spelling_probability("xx")


def test_the_discounts_by_hand() -> None:
    """Counts 1, 1, 1, 1, 2, 2, 3, 4: Y = 4 / (4 + 2 x 2) = 1/2; D1 = 1 - 2 x 1/2 x 2/4 = 1/2; D2 = 2 - 3 x 1/2 x 1/2
    = 5/4; D3 = 3 - 4 x 1/2 x 1/1 = 1. With a second 4, D3 would be -1, so it is Y."""
    counts = [1, 1, 1, 1, 2, 2, 3, 4]
    np.testing.assert_allclose(ngrams._discounts(np.array(counts)), [0.5, 1.25, 1])
    np.testing.assert_allclose(ngrams._discounts(np.array([*counts, 4, 4, 9])), [0.5, 1.25, 0.5])
    np.testing.assert_allclose(ngrams._discounts(np.array([2, 2])), [0.5, 2, 0.5])  # no count of 1: Y = 1/2
    np.testing.assert_allclose(ngrams._discounts(np.array([], int)), [0.5, 0.5, 0.5])


def test_without_training_text_words_are_spelled() -> None:
    found = ngram_probabilities([], ["a bc"], 3)
    np.testing.assert_allclose(found, [257.0**-2, 257.0**-4, 257.0**-1], rtol=1e-12)


def test_numbers_of_rows_stay_exact_up_to_the_last_bit() -> None:
    """With W words, a key below 2^63 / W - 1 can take one more column."""
    words = 2**31
    rows = np.array([[words - 1, words - 1, words - 1], [words - 1, words - 1, words - 2], [0, 0, 0], [0, 0, 1]])
    packed = ngrams._packed(rows, words)
    assert len(set(packed.tolist())) == 4
    assert (packed >= 0).all()
    assert ngrams._packed(np.zeros((0, 3), int), 5).tolist() == []
    assert ngrams._packed(np.array([[1, 2], [0, 4]]), 5).tolist() == [7, 4]


def test_different_rows_come_with_their_numbers() -> None:
    rows, counts = ngrams._distinct(np.array([[1, 0], [0, 1], [1, 0], [1, 0]]), 2)
    assert {tuple(row): int(n) for row, n in zip(rows, counts, strict=True)} == {(1, 0): 3, (0, 1): 1}
