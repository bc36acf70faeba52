"""The trigram baseline: proper probabilities of exact bytes, and its formula on a case worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data.synthetic.trigram import END, TrigramModel, spelling_probability, trigram_bits_per_byte, words_of

STORIES = ["The cat sat. The cat ran!", "The dog sat.", "A cat ran to the dog.", "The dog sat."]


@given(st.text())
def test_words_joined_are_the_text(text: str):
    assert "".join(words_of(text)) == text


def test_words_keep_the_space_before_them():
    assert words_of('"Oh, my  cat!" said Tom.') == [
        '"',
        "Oh",
        ",",
        " my",
        " ",
        " cat",
        "!",
        '"',
        " said",
        " Tom",
        ".",
    ]


def test_spelling_sums_to_one_over_all_byte_strings():
    """256^n strings of n bytes: the sum up to n is 1 - (256/257)^(n+1), which goes to 1."""
    for n in range(4):
        total = math.fsum(256**k * spelling_probability("x" * k) for k in range(n + 1))
        assert total == pytest.approx(1 - (256 / 257) ** (n + 1))
    assert spelling_probability("é") == spelling_probability("xx")


@pytest.mark.parametrize(
    "before", [(END, END), (END, "The"), (" cat", " sat"), (" sat", " cat"), ("x", " dog"), ("x", "y")]
)
def test_probabilities_sum_to_one(before: tuple[str, str]):
    """Over the words seen in training, and all other byte strings, whose probability is a constant times that
    of their spelling: after known words, unknown ones, and known ones in an order never seen."""
    model = TrigramModel(STORIES)
    seen = math.fsum(model.probability(word, before) for word in model.vocabulary)
    constant = model.probability(" zebra", before) / spelling_probability(" zebra")
    unseen = constant * (1 - math.fsum(map(spelling_probability, model.vocabulary)))
    assert unseen > 0
    assert seen + unseen == pytest.approx(1, abs=1e-12)


def test_the_formula_by_hand():
    """Stories "a", "a" and "b", with E for the end of a story.

    Trigrams: EEa 2, EEb 1, EaE 2, EbE 1: two counted once, two twice, so d3 = 2 / (2 + 2 x 2) = 1/3.
    Distinct trigrams by their last two words: Ea 1, Eb 1, aE 1, bE 1: d2 = 4 / (4 + 0) = 1.
    Distinct bigrams by their last word: a 1, b 1, E 2: d1 = 2 / (2 + 2 x 1) = 1/2, N(*) = 3, N(* *) = 4.
    """
    a = (1 - 1 / 2 + 1 / 2 * 3 * 257**-2) / 4
    a_after_end = (0 + 1 * 2 * a) / 2
    a_at_start = (2 - 1 / 3 + 1 / 3 * 2 * a_after_end) / 3
    end = (2 - 1 / 2 + 1 / 2 * 3 * 257**-1) / 4
    end_after_a = (0 + 1 * 1 * end) / 1
    end_of_a = (2 - 1 / 3 + 1 / 3 * 1 * end_after_a) / 2
    model = TrigramModel(["a", "a", "b"])
    assert model.probability("a", ("q", "q")) == pytest.approx(a)
    assert model.probability("a", ("q", END)) == pytest.approx(a_after_end)
    assert model.probability("a", (END, END)) == pytest.approx(a_at_start)
    assert model.probability(END, (END, "a")) == pytest.approx(end_of_a)
    assert model.bits(["a"]) == pytest.approx(-math.log2(a_at_start * end_of_a))
    assert trigram_bits_per_byte(["a", "a", "b"], ["a"]) == pytest.approx(-math.log2(a_at_start * end_of_a))


def test_bits_per_byte_counts_utf8_bytes_of_all_stories():
    model = TrigramModel(STORIES)
    valid = ["The café sat.", "猫"]
    expected = (model.bits(valid[:1]) + model.bits(valid[1:])) / (14 + 3)
    assert trigram_bits_per_byte(STORIES, valid) == pytest.approx(expected)
    assert math.isfinite(expected)


def test_two_words_of_context_are_used_and_a_third_is_not():
    """After " x y" the next word is certain. What stands three words back decides nothing."""
    by_two = [f"{a} {b} {a}{b}" for a in "xyz" for b in "xyz"] * 50
    by_three = [f"{a} so so {a}" for a in "xyz"] * 50
    assert TrigramModel(by_two).bits(["x y xy"]) == pytest.approx(math.log2(9), abs=0.2)
    assert TrigramModel(by_three).bits(["x so so x"]) == pytest.approx(2 * math.log2(3), abs=0.2)
