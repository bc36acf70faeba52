"""The embedded corpus: exact probabilities, a floor far below a trigram model, clean English."""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from itertools import islice

import pytest
import xxhash

from moe_jax.data.synthetic.grammar import Derivation, Grammar, Word
from moe_jax.data.synthetic.stories import (
    RULES,
    RULES_DIGEST,
    SLOTS,
    VALIDATION_STORIES,
    fingerprint,
    generate,
)
from tests.support.grammar import STORIES, code_length_bits, derivations

CHILDREN = (*SLOTS["hero"], *SLOTS["friend"])


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(generate(0, "train", 1500))


@pytest.fixture(scope="module")
def valid() -> list[str]:
    return list(generate(0, "valid", VALIDATION_STORIES))


def sampled(count: int) -> list[Derivation]:
    """Derivations of the tale, each from a seed of its own."""
    return [STORIES.sample(random.Random(i).random) for i in range(count)]


# Exact probabilities.


def test_the_text_determines_its_derivation():
    for derivation in sampled(100):
        assert list(derivations(STORIES, derivation.text)) == [derivation]
        assert code_length_bits(derivation.text) == pytest.approx(derivation.bits, abs=1e-9)


def test_probabilities_of_a_small_tale_sum_to_one():
    """The tale's own rules with all plots and closings, every other choice cut to its first option and every
    list to a few words: each story that is left is another text, and all probabilities sum to 1."""
    small = Grammar({name: _first_options(name, rule) for name, rule in RULES.items()}, _short_lists(SLOTS))
    found = list(derivations(small))
    assert len(found) > 1000
    assert len({d.text for d in found}) == len(found)
    assert math.fsum(2**-d.bits for d in found) == pytest.approx(1, abs=1e-9)
    for derivation in islice(found, 0, None, 50):
        assert list(derivations(small, derivation.text)) == [derivation]


def _first_options(name: str, rule: str) -> str:
    return rule if name in ("plot", "closing") else re.sub(r"\[([^\[\]|]*)\|[^\[\]]*\]", r"\1", rule)


def _short_lists(slots: Mapping[str, Sequence[Word]]) -> dict[str, Sequence[Word]]:
    """Lists that several slots share keep a word for each, some others keep two, the rest one."""
    sharing = {id(words): sum(other is words for other in slots.values()) for words in slots.values()}
    longer = {id(slots[name]): 2 for name in ("hero", "friend")}
    short = {id(words): tuple(words[: max(sharing[id(words)], longer.get(id(words), 1))]) for words in slots.values()}
    return {name: short[id(words)] for name, words in slots.items()}


def test_a_text_that_forgets_itself_is_impossible(valid: list[str]):
    """With another name in the last mention of the hero there is no derivation, though each word is known."""
    names = [word[""] for word in CHILDREN]
    for story in valid[:100]:
        hero = re.findall(r"named (\w+)", story)[0]
        head, _, tail = story.rpartition(hero)
        other = next(name for name in names if name not in story)
        assert math.isfinite(code_length_bits(story))
        assert code_length_bits(head + other + tail) == math.inf


# Generation.


def test_a_story_depends_on_seed_split_and_index_only():
    ten = list(generate(3, "train", 10))
    assert list(generate(3, "train", 4)) == ten[:4]
    for others in (generate(4, "train", 10), generate(3, "valid", 10)):
        assert not set(ten) & set(others)


# English.


@pytest.mark.parametrize(
    "wrong",
    [
        r"\ba (?=[aeiou]|honest)",
        r"\ban (?![aeiou]|honest)",
        r"  |^ | $| [,.!?]",
        r"[.!?] [a-z]",
        r"[{}<>\[\]|]",
        r"[^A-Za-z ,.!?\"]",
        r"\b(\w+) \1\b",
    ],
)
def test_no_slip_of_the_pen(wrong: str, train: list[str]):
    """Articles, spaces, capitals, brackets of the notation, odd characters, a word twice."""
    assert not [story for story in train if re.search(wrong, story)]


def test_pronouns_agree_with_the_children(train: list[str]):
    """A girl is called a girl and puts on her coat; and where all children are girls, nobody is a he."""
    forms = {word[""]: word for word in CHILDREN}
    for story in train:
        kind, hero, his = re.findall(r"(girl|boy) named (\w+) \w+ on (her|his)", story)[0]
        assert (kind, his) == (forms[hero]["child"], forms[hero]["his"])
        words = set(re.findall(r"\w+", story))
        genders = {forms[word]["he"] for word in words & set(forms)}
        assert ("she" in genders) or not words & {"she", "She", "her", "girl"}
        assert ("he" in genders) or not words & {"he", "He", "him", "his", "boy"}


def test_the_corpus_is_the_one_of_earlier_runs() -> None:
    """Caches and saved runs know it by these digests. Change RULES_DIGEST only together with the stories."""
    rules = {name: " ".join(rule.split()) for name, rule in RULES.items()}
    words = {name: list(slot) for name, slot in SLOTS.items()}
    digest = xxhash.xxh3_128(json.dumps([rules, words], sort_keys=True).encode())
    for split in ("train", "valid"):
        for story in generate(0, split, 64):
            digest.update(story.encode())
    assert (digest.hexdigest(), 600) == (RULES_DIGEST, VALIDATION_STORIES)
    assert fingerprint(0, 100) == xxhash.xxh3_128_hexdigest(f"0 100 600 {RULES_DIGEST}".encode())
    assert len({fingerprint(*settings) for settings in ((0, 100), (1, 100), (0, 101), (1, 11), (11, 1))}) == 5
