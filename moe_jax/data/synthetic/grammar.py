"""Probabilistic grammars with memory: one set of rules is used to sample texts, to enumerate them, and to parse them.

A grammar is a set of rules, each a text (white space counts as one space) with four kinds of blanks:

    [a|b|c]        one of the options, each with the same probability; options nest
    <rule>         the text of another rule, with choices of its own at every use
    {slot}         a word. The first mention draws one from the slot's list, each with the same probability;
                   every later mention repeats it
    {slot.form}    another form of that word: {hero.his}, {colour.a} ("an orange")

Slots that draw from the same list never hold the same word: a later slot draws uniformly from the words that are left.

A derivation is the sequence of choices that wrote a text. All choices form a tree. `sample` takes one random path
through the tree, and `derivations` takes all of them. To parse a text, `derivations` skips every branch that disagrees
with the text. Every choice is uniform, so a derivation with choices among n_1, n_2, ... options has the probability
p = 1 / (n_1 n_2 ...), and its code length is -log2(p) bits.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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


class Mention(NamedTuple):
    """A place of a text where a slot's word stands: the characters [start, end)."""

    slot: Slot
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Derivation:
    """A text, and the choices that wrote it, in order: (index, number of options)."""

    text: str
    choices: tuple[tuple[int, int], ...]
    mentions: tuple[Mention, ...] = field(default=(), compare=False)
    """In order. Known of a text that was sampled."""

    @property
    def bits(self) -> float:
        """-log2 of the probability of these choices."""
        return math.fsum(math.log2(options) for _, options in self.choices)


class Grammar:
    """Rules and word lists, compiled. The rule named `start` is the whole text.

    Raises ValueError if a rule names a rule, slot or form that does not exist, if a rule contains itself, or if its
    brackets are unbalanced.
    """

    def __init__(self, rules: Mapping[str, str], slots: Mapping[str, Sequence[Word]], start: str = "start") -> None:
        self._slots = slots
        self._rivals = {a: [b for b in slots if b != a and slots[b] is slots[a]] for a in slots}
        self.template = _Compiler(rules, slots).rule(start)

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
        mentions: list[Mention] = []
        memory: Memory = {}
        written = 0
        todo: list[Node] = list(reversed(self.template))
        while todo:
            node = todo.pop()
            if isinstance(node, str):
                pieces.append(node)
            elif isinstance(node, Options):
                count = len(node.templates)
                index = int(random() * count)
                choices.append((index, count))
                todo.extend(reversed(node.templates[index]))
            else:
                if node.name not in memory:
                    words = self.words(node.name, memory)
                    index = int(random() * len(words))
                    choices.append((index, len(words)))
                    memory[node.name] = words[index]
                pieces.append(memory[node.name][node.form])
                mentions.append(Mention(node, written, written + len(pieces[-1])))
            if not isinstance(node, Options):
                written += len(pieces[-1])
        return Derivation("".join(pieces), tuple(choices), tuple(mentions))

    def derivations(self, text: str | None = None) -> Iterator[Derivation]:
        """Every derivation of the grammar or, with `text`, every derivation of this text. There is none if the grammar
        cannot write the text."""
        stack = [_Partial(self.template, "", (), {})]
        while stack:
            todo, written, choices, memory = stack.pop()
            if not todo:
                if text is None or written == text:
                    yield Derivation(written, choices)
                continue
            node, rest = todo[0], todo[1:]
            if isinstance(node, str):
                grown = [_Partial(rest, written + node, choices, memory)]
            elif isinstance(node, Options):
                count = len(node.templates)
                grown = [
                    _Partial(option + rest, written, (*choices, (i, count)), memory)
                    for i, option in enumerate(node.templates)
                ]
            elif node.name in memory:
                grown = [_Partial(rest, written + memory[node.name][node.form], choices, memory)]
            else:
                words = self.words(node.name, memory)
                grown = [
                    _Partial(
                        rest,
                        written + word[node.form],
                        (*choices, (i, len(words))),
                        {**memory, node.name: word},
                    )
                    for i, word in enumerate(words)
                ]
            stack.extend(p for p in reversed(grown) if text is None or text.startswith(p.written))


class _Partial(NamedTuple):
    """An incomplete derivation: the template that is still to be written, and the text and choices so far."""

    todo: Template
    written: str
    choices: tuple[tuple[int, int], ...]
    memory: Memory


class _Compiler:
    """Compiles rules into templates. A rule that another rule uses is copied into its template."""

    _TOKEN = re.compile(r"[\[\]|]|<\w+>|\{\w+(?:\.\w+)?\}|[^\[\]|<>{}]+|.", re.DOTALL)

    def __init__(self, rules: Mapping[str, str], slots: Mapping[str, Sequence[Word]]) -> None:
        self._rules = rules
        self._slots = slots
        self._open: list[str] = []
        self._done: dict[str, Template] = {}

    def rule(self, name: str) -> Template:
        if name not in self._rules:
            raise ValueError(f"no rule is named {name!r}; the rules are {', '.join(self._rules)}")
        if name in self._open:
            raise ValueError(f"rule {name!r} contains itself: {' > '.join([*self._open, name])}")
        if name not in self._done:
            self._open.append(name)
            tokens = self._TOKEN.findall(" ".join(self._rules[name].split()))[::-1]
            template = self._options(tokens)
            if tokens:
                raise ValueError(f"rule {name!r} has a ] without its [")
            self._open.pop()
            self._done[name] = template
        return self._done[name]

    def _options(self, tokens: list[str]) -> Template:
        """Reads templates between bars, up to the closing bracket or the end. The bracket stays in `tokens`."""
        templates: list[list[Node]] = [[]]
        while tokens and tokens[-1] != "]":
            token = tokens.pop()
            if token == "|":
                templates.append([])
            else:
                templates[-1].extend(self._read(token, tokens))
        if len(templates) == 1:
            return _merged(templates[0])
        return (Options(tuple(_merged(template) for template in templates)),)

    def _read(self, token: str, tokens: list[str]) -> Template:
        if token == "[":
            template = self._options(tokens)
            if not tokens:
                raise ValueError(f"rule {self._open[-1]!r} has a [ without its ]")
            tokens.pop()
            return template
        if token[0] == "<" and token[-1] == ">":
            return self.rule(token[1:-1])
        if token[0] == "{" and token[-1] == "}":
            name, _, form = token[1:-1].partition(".")
            if name not in self._slots or any(form not in word for word in self._slots[name]):
                raise ValueError(f"rule {self._open[-1]!r}: {token} names a slot or a form that does not exist")
            return (Slot(name, form),)
        if token in "<>{}":
            raise ValueError(f"rule {self._open[-1]!r} has a stray {token}")
        return (token,)


def _merged(nodes: Sequence[Node]) -> Template:
    """The same nodes with neighbouring texts joined."""
    merged: list[Node] = []
    for node in nodes:
        if merged and isinstance(node, str) and isinstance(merged[-1], str):
            merged[-1] += node
        else:
            merged.append(node)
    return tuple(merged)
