"""Probabilistic grammars with memory, which write texts of an exact probability.

A grammar is a set of rules, each a text (white space counts as one space) with four kinds of blanks:

    [a|b|c]        one of the options, each with the same probability; options nest
    <rule>         the text of another rule, with choices of its own at every use
    {slot}         a word. The first mention draws one from the slot's list, each with the same probability;
                   every later mention repeats it
    {slot.form}    another form of that word: {hero.his}, {colour.a} ("an orange")

Slots that draw from the same list never hold the same word: a later slot draws uniformly from the words that are left.

A derivation is the sequence of choices that wrote a text. Every choice is uniform, so a derivation with choices among
n_1, n_2, ... options has the probability p = 1 / (n_1 n_2 ...), and its code length is -log2(p) bits.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Word = Mapping[str, str]
"""The forms of one word, by name. The name "" holds the plain word."""

Memory = dict[str, Word]
"""Which word each slot of a text holds so far."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A blank that is filled with one form of the slot's word."""

    name: str
    form: str


@dataclass(frozen=True, slots=True)
class Options:
    """A blank that is filled with one of several templates."""

    templates: tuple["Template", ...]


Node = str | Slot | Options
Template = tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Derivation:
    """A text, and the choices that wrote it, in order: (index, number of options)."""

    text: str
    choices: tuple[tuple[int, int], ...]

    @property
    def bits(self) -> float:
        """-log2 of the probability of these choices."""
        return math.fsum(math.log2(options) for _, options in self.choices)


class Grammar:
    """Rules and word lists, compiled. The rule `start` is the whole text."""

    def __init__(self, rules: Mapping[str, str], slots: Mapping[str, Sequence[Word]]) -> None:
        self._slots = slots
        self._rivals = {a: [b for b in slots if b != a and slots[b] is slots[a]] for a in slots}
        self.template = _compiled(rules, "start")

    def words(self, slot: str, memory: Memory) -> Sequence[Word]:
        """The words that a slot may still take: those of its list that no other slot of the text holds."""
        taken = [memory[rival] for rival in self._rivals[slot] if rival in memory]
        if not taken:
            return self._slots[slot]
        return [word for word in self._slots[slot] if not any(word is other for other in taken)]

    def sample(self, random: Callable[[], float]) -> Derivation:
        """One text. `random` returns uniform numbers in [0, 1)."""
        pieces: list[str] = []
        choices: list[tuple[int, int]] = []
        memory: Memory = {}
        todo = list(reversed(self.template))
        while todo:
            node = todo.pop()
            if isinstance(node, Options):
                count = len(node.templates)
                index = int(random() * count)
                choices.append((index, count))
                todo.extend(reversed(node.templates[index]))
                continue
            if isinstance(node, str):
                pieces.append(node)
            else:
                if node.name not in memory:
                    words = self.words(node.name, memory)
                    index = int(random() * len(words))
                    choices.append((index, len(words)))
                    memory[node.name] = words[index]
                pieces.append(memory[node.name][node.form])
        return Derivation("".join(pieces), tuple(choices))


_TOKEN = re.compile(r"[\[\]|]|<\w+>|\{\w+(?:\.\w+)?\}|[^\[\]|<>{}]+")


def _compiled(rules: Mapping[str, str], name: str) -> Template:
    """The template of a rule. A rule that it uses is copied into it."""
    return _options(_TOKEN.findall(" ".join(rules[name].split()))[::-1], rules)


def _options(tokens: list[str], rules: Mapping[str, str]) -> Template:
    """Reads templates between bars, up to the closing bracket or the end. The bracket stays in `tokens`."""
    templates: list[list[Node]] = [[]]
    while tokens and tokens[-1] != "]":
        token = tokens.pop()
        if token == "|":
            templates.append([])
        elif token == "[":
            templates[-1].extend(_options(tokens, rules))
            tokens.pop()
        elif token[0] == "<":
            templates[-1].extend(_compiled(rules, token[1:-1]))
        elif token[0] == "{":
            name, _, form = token[1:-1].partition(".")
            templates[-1].append(Slot(name, form))
        else:
            templates[-1].append(token)
    made = tuple(map(tuple, templates))
    return made[0] if len(made) == 1 else (Options(made),)
