"""The grammar machinery on grammars small enough to work out by hand."""

import math
from collections.abc import Iterator

import pytest

from moe_jax.data.synthetic.grammar import Grammar
from tests.support.grammar import derivations

FRUIT = ({"": "fig", "a": "a fig"}, {"": "plum", "a": "a plum"}, {"": "apple", "a": "an apple"})


def draws(choices: tuple[tuple[int, int], ...]) -> Iterator[float]:
    """Numbers in [0, 1) that make `sample` repeat these choices: the middle of each option's interval."""
    return ((index + 0.5) / options for index, options in choices)


def test_a_slot_is_drawn_once_and_repeated():
    grammar = Grammar({"start": "I ate {x.a}. The {x} was [ripe|sour]."}, {"x": FRUIT})
    assert {d.text: d.bits for d in derivations(grammar)} == {
        f"I ate {word['a']}. The {word['']} was {taste}.": pytest.approx(math.log2(3 * 2))
        for word in FRUIT
        for taste in ("ripe", "sour")
    }


def test_slots_of_one_list_never_share_a_word():
    """3 x 2 = 6 ordered pairs, each with probability 1/6: the second draw is among the two words left."""
    grammar = Grammar({"start": "{x} {y} {x}"}, {"x": FRUIT, "y": FRUIT})
    found = list(derivations(grammar))
    assert sorted(d.text for d in found) == [
        "apple fig apple",
        "apple plum apple",
        "fig apple fig",
        "fig plum fig",
        "plum apple plum",
        "plum fig plum",
    ]
    assert all(d.choices[0][1] == 3 and d.choices[1][1] == 2 for d in found)


def test_parsing_finds_every_derivation_of_an_ambiguous_text():
    grammar = Grammar({"start": "[a|aa][a|]"}, {})
    assert [d.choices for d in derivations(grammar, "aa")] == [((0, 2), (0, 2)), ((1, 2), (1, 2))]


@pytest.mark.parametrize("text", ["", "fi", "fig ", "fig plu", "fig plums", "plum plum", "fig fig"])
def test_a_text_that_the_grammar_can_not_write_has_no_derivation(text: str):
    grammar = Grammar({"start": "{x} {y}"}, {"x": FRUIT, "y": FRUIT})
    assert list(derivations(grammar, text)) == []


def test_sampling_enumerating_and_parsing_agree_on_every_text():
    """Of all derivations of a grammar with every kind of blank: the sampler writes each from its choices, the
    parser reads each back, and the probabilities sum to 1."""
    rules = {"start": "[{x.a}, <list>|no {y}, <list>]", "list": "{x} [and {y}|alone][ {z}|]."}
    grammar = Grammar(rules, {"x": FRUIT, "y": FRUIT, "z": ({"": "today"}, {"": "at noon"})})
    found = list(derivations(grammar))
    for derivation in found:
        assert grammar.sample(draws(derivation.choices).__next__) == derivation
        assert list(derivations(grammar, derivation.text)) == [derivation]
    assert len({d.text for d in found}) == len(found)
    assert math.fsum(2**-d.bits for d in found) == pytest.approx(1, abs=1e-12)


def test_the_ends_of_the_interval_are_the_first_and_the_last_option() -> None:
    grammar = Grammar({"start": "[a|b|c] {x}"}, {"x": FRUIT})
    assert grammar.sample(lambda: 0.0).text == "a fig"
    assert grammar.sample(lambda: 1 - 2**-53).text == "c apple"
