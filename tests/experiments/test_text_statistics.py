"""Repetition and distinct n-grams, worked by hand; and draws of as many words."""

import math

from moe_jax.experiments.text_statistics import distinct, matched_draws, repetition, words


def test_words() -> None:
    assert words("Don't, Tim!\nOne-two 3.") == ["don't", "tim", "one", "two", "3"]


def test_repetition_is_within_a_text() -> None:
    """a b a b a: the pairs ab ba ab ba, two of which stood there before. The second text has the pair ab for itself."""
    assert repetition(["ababa"], 2) == 0.5
    assert repetition(["ababa", "ab"], 2) == 1 - (2 + 1) / (4 + 1)
    assert repetition(["abc", "abc"], 1) == 0
    assert repetition(["aaaa"], 4) == 0
    assert repetition(["aaaaa"], 4) == 0.5


def test_distinct_is_over_all_texts() -> None:
    """ab and ab: two words of four; one pair of two, and none goes from one text to the next."""
    assert distinct(["ab", "ab"], 1) == 0.5
    assert distinct(["ab", "ab"], 2) == 0.5
    assert distinct(["ab", "ba"], 2) == 1
    assert distinct(["abc"], 3) == 1


def test_texts_without_n_grams_say_nothing() -> None:
    assert math.isnan(distinct(["a", ""], 2))
    assert math.isnan(repetition([], 1))


def test_draws_have_the_lengths_of_the_texts_and_share_no_story() -> None:
    """Lengths 3 and 1. First draw: the first story of at least 3 words is abcd, cut; then the first left, ef. Second:
    ghi, then j. Third: klmno, and nothing is left for the 1."""
    stories = ["ef", "abcd", "ghi", "j", "klmno"]
    assert matched_draws(["xxx", "x"], stories, 9) == [["abc", "e"], ["ghi", "j"]]
    assert matched_draws(["xxx", "x"], stories, 1) == [["abc", "e"]]
    assert matched_draws(["x" * 9], stories, 9) == []
