"""Minimal pairs: one word differs, and the grammar can write only the good text."""

import random
from collections import Counter

from moe_jax.data.synthetic import stories
from moe_jax.data.synthetic.grammar import Grammar
from moe_jax.data.synthetic.minimal_pairs import FORMS, KINDS, minimal_pairs, pairs_of

KNOWN = {*KINDS, *FORMS.values(), "knowledge"}


def test_the_grammar_can_write_the_good_text_only() -> None:
    for i in range(12):
        story = stories.sample(3, "valid", i)
        found = list(pairs_of(story, random.Random(0)))
        assert len(found) > 8
        for pair in found:
            assert story.text.startswith(pair.good)
            assert stories.code_length_bits(pair.bad + story.text[len(pair.good) :]) == float("inf"), pair


def test_one_word_differs() -> None:
    for pair in minimal_pairs(0, 200):
        words = list(zip(pair.good.split(), pair.bad.split(), strict=True))
        assert 1 <= sum(a != b for a, b in words) <= 2  # "an orange" and "a blue" differ in the article too
        assert pair.good[-1] in '.!?"'


def test_all_kinds_come_up_and_the_pairs_are_a_function_of_the_seed() -> None:
    pairs = list(minimal_pairs(0, 400))
    assert {pair.kind for pair in pairs} == KNOWN
    assert max(Counter(pair.kind for pair in pairs).values()) < 100
    assert pairs == list(minimal_pairs(0, 400))
    assert pairs != list(minimal_pairs(1, 400))


def test_mentions_are_where_the_words_stand() -> None:
    words = [{"": word, "a": f"a {word}"} for word in ("kite", "doll")]
    grammar = Grammar({"start": "Take [one|two]: {toy.a}, my {toy}."}, {"toy": words})
    text = grammar.sample(lambda: 0.0)
    assert text.text == "Take one: a kite, my kite."
    assert [(m.slot.form, text.text[m.start : m.end]) for m in text.mentions] == [("a", "a kite"), ("", "kite")]


def test_the_first_pairs_of_a_story_by_hand() -> None:
    """Ben's name is no pair where it is told: only "boy" stood before it. The distance is in words."""
    story = stories.sample(0, "valid", 0)
    assert story.text.startswith(
        "Once upon a misty afternoon, an honest boy named Ben pulled on his woolly shoes and hopped to the field. Ben "
        "saw a little pink box by a broken bush. Now he joined Kate, who grew rather upset."
    )
    asked = []
    for pair in list(pairs_of(story, random.Random(0)))[:3]:
        word = next(good for good, bad in zip(pair.good.split(), pair.bad.split(), strict=True) if good != bad)
        asked.append((pair.kind, word, pair.distance))
    assert asked == [("pronoun", "his", 3), ("name", "Ben", 11), ("pronoun", "he", 11)]
