"""Minimal pairs of the embedded corpus: two texts that differ in one word, of which the grammar can write only one.

A story draws its details once and mentions them again: the friend's name, the colour of the toy. A pair is a story up
to the end of a sentence that mentions a detail again, and the same text with another word of the same kind in that
place. Every other word is equal. A model that remembers the detail gives the first text the higher probability. This
is the method of BLiMP (Warstadt et al. 2020, section 3), with memory in place of grammar.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from moe_jax.data.synthetic import stories
from moe_jax.data.synthetic.grammar import Mention, Slot
from moe_jax.data.synthetic.vocabulary import SLOTS

KINDS = {
    "name": ("hero", "friend", "elder", "animal"),
    "object": ("toy", "prize", "treat", "spot", "clothes"),
    "quality": ("colour", "hue", "look", "texture", "trait", "pattern", "weather", "build"),
    "feeling": ("sad", "happy", "fright"),
    "place": ("place", "scary"),
    "activity": ("game", "skill"),
}
"""What a slot's plain word is."""
FORMS = {"he": "pronoun", "He": "pronoun", "his": "pronoun", "him": "pronoun", "child": "pronoun"}
"""Forms that agree with a word and do not repeat it. An animal's sound, home and food are "knowledge"."""
FROM_ONE_STORY = 4
"""Pairs of each story. They are of different kinds, so that rare kinds have pairs too."""
_SENTENCE_END = re.compile(r"[.!?]\"?")


@dataclass(frozen=True)
class MinimalPair:
    """Two texts. `good` is the beginning of a story of the corpus."""

    kind: str
    good: str
    bad: str
    distance: int
    """Words from the last mention of the same detail to this one."""


def minimal_pairs(seed: int, count: int) -> Iterator[MinimalPair]:
    """`count` pairs from stories of the validation split, which no training run has seen. A function of both
    arguments."""
    made, i = 0, 0
    while made < count:
        draw = random.Random(f"{seed} pairs {i}")
        kinds: dict[str, list[MinimalPair]] = {}
        for pair in pairs_of(stories.sample(seed, "valid", i), draw):
            kinds.setdefault(pair.kind, []).append(pair)
        i += 1
        for kind in draw.sample(sorted(kinds), min(FROM_ONE_STORY, len(kinds), count - made)):
            made += 1
            yield draw.choice(kinds[kind])


def pairs_of(story: stories.Derivation, draw: random.Random) -> Iterator[MinimalPair]:
    """A pair for each mention of a detail that was mentioned before. A word must have been there itself; a form that
    agrees with it, such as a pronoun, follows from any of its forms."""
    last: dict[tuple[str, bool], Mention] = {}
    for mention in story.mentions:
        slot, kind = mention.slot, kind_of(mention.slot)
        repeats = slot.form in ("", "a")
        before = last.get((slot.name, repeats))
        last[slot.name, False] = mention
        if repeats:
            last[slot.name, True] = mention
        if before is None or kind is None:
            continue
        right = story.text[mention.start : mention.end]
        others = sorted({word[slot.form] for word in SLOTS[slot.name]} - {right} - _present(story))
        if not others:
            continue
        end = _SENTENCE_END.search(story.text, mention.end)
        rest = story.text[mention.end : end.end() if end else len(story.text)]
        start = story.text[: mention.start]
        distance = len(story.text[before.end : mention.start].split()) + 1
        yield MinimalPair(kind, start + right + rest, start + draw.choice(others) + rest, distance)


def kind_of(slot: Slot) -> str | None:
    """The kind of a mention. None for words that are not details, such as the food of a supper."""
    if slot.form in FORMS:
        return FORMS[slot.form]
    if slot.name == "animal" and slot.form not in ("", "a"):
        return "knowledge"
    return next((kind for kind, slots in KINDS.items() if slot.name in slots), None)


def _present(story: stories.Derivation) -> set[str]:
    """All words of the story's slots. A wrong word that stands elsewhere in the story would be a harder pair."""
    return {story.text[m.start : m.end] for m in story.mentions if m.slot.form not in FORMS}
