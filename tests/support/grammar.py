"""Every text of a grammar, and every way to write a text: an oracle for the sampler of `data/synthetic`."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.data.synthetic.grammar import Derivation, Grammar, Memory, Options, Template
from moe_jax.data.synthetic.stories import RULES, SLOTS

STORIES = Grammar(RULES, SLOTS)


class _Partial(NamedTuple):
    """An incomplete derivation: the template that is still to be written, and what was written and chosen so far."""

    todo: Template
    written: str
    choices: tuple[tuple[int, int], ...]
    memory: Memory


def derivations(grammar: Grammar, text: str | None = None) -> Iterator[Derivation]:
    """Every derivation of the grammar or, with `text`, every derivation of this text. There is none if the grammar
    cannot write the text. All choices form a tree; a branch that disagrees with the text is skipped."""
    stack = [_Partial(grammar.template, "", (), {})]
    while stack:
        todo, written, choices, memory = stack.pop()
        if text is not None and not text.startswith(written):
            continue
        if not todo:
            if text in (None, written):
                yield Derivation(written, choices)
            continue
        node, rest = todo[0], todo[1:]
        if isinstance(node, str):
            stack.append(_Partial(rest, written + node, choices, memory))
        elif isinstance(node, Options):
            for i, option in reversed(list(enumerate(node.templates))):
                stack.append(_Partial(option + rest, written, (*choices, (i, len(node.templates))), memory))
        elif node.name in memory:
            stack.append(_Partial(rest, written + memory[node.name][node.form], choices, memory))
        else:
            words = grammar.words(node.name, memory)
            for i, word in reversed(list(enumerate(words))):
                stack.append(_Partial(todo, written, (*choices, (i, len(words))), {**memory, node.name: word}))


def code_length_bits(story: str) -> float:
    """-log2 of the probability of a story: the sum over all its derivations. inf if the grammar cannot write it."""
    probability = math.fsum(2.0**-derivation.bits for derivation in derivations(STORIES, story))
    return -math.log2(probability) if probability > 0 else math.inf
