"""How long the passages are that a model's texts have in common with its training text.

    uv run python benchmarks/copies.py --run runs/nano --texts 32

Every text repeats something: "Once upon a time, there was a little girl". So validation texts, which the model has not
seen, are measured beside it, cut to the same lengths where they are long enough. A model that has learned its training
text by heart has clearly longer copies than they have.

The passages are found by a suffix automaton. It has a state for each set of substrings that end at the same places
(Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text"). It is built of the short texts. The
long text then runs through it once: the time is proportional to the tokens of both, and the memory to the tokens of the
short texts.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from write_samples import open_writer

from moe_jax.cli.main import main
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.system import environment
from moe_jax.system.files import json_text

MOST_TOKENS = 20_000_000
"""Only the first tokens of a longer training text are searched, to stay within about fifteen seconds."""
_PART = 1 << 16
LONGEST_TEXT = 400
"""Longest text that the model writes, in tokens."""


@dataclass(frozen=True)
class Copies:
    """The longest passage of each of some texts that occurs in the training text."""

    texts: int
    tokens: int
    """Tokens of all texts."""
    longest: int
    """Tokens of the longest passage of all texts."""
    median: float
    """Median over the texts of the longest passage of each, in tokens."""
    passage: str
    """The longest passage itself."""

    @property
    def words(self) -> int:
        """Words of the longest passage."""
        return len(self.passage.split())

    def describe(self, of: str) -> str:
        """One sentence; `of` says what the texts are."""
        return (
            f"{self.texts:,} {of}, {self.tokens:,} tokens: the longest passage that is also in the training text has "
            f"{self.longest:,} tokens ({self.words:,} words). The median over the texts is {self.median:g} tokens"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "longest_tokens": self.longest,
            "longest_words": self.words,
            "median_tokens": self.median,
            "longest_passage": self.passage,
        }


def measure(
    texts: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]], train: np.ndarray, tokenizer: Tokenizer
) -> tuple[Copies, Copies | None]:
    """The copies in the model's texts, and in pieces of the validation text; None without pieces.

    Texts are token ids, without separators. `train` is int [N], the training stream.
    """
    found = longest_copies([*texts, *pieces], _in_parts(train[:MOST_TOKENS]))
    own = _summary(texts, found[: len(texts)], tokenizer)
    return own, _summary(pieces, found[len(texts) :], tokenizer) if pieces else None


def pieces_of(documents: Iterable[Sequence[int]], lengths: Sequence[int]) -> list[Sequence[int]]:
    """A piece of each length, from the documents in order. Pieces do not overlap.

    A document that is shorter than a length is a piece as it is. The rest of a document that is shorter than the next
    length is left out. If the documents end before the lengths do, there are fewer pieces.
    """
    pieces: list[Sequence[int]] = []
    for document in documents:
        first = 0
        while len(pieces) < len(lengths) and (first == 0 or first + lengths[len(pieces)] <= len(document)):
            pieces.append(document[first : first + lengths[len(pieces)]])
            first += max(len(pieces[-1]), 1)
        if len(pieces) == len(lengths):
            break
    return pieces


def _in_parts(tokens: np.ndarray) -> Iterator[int]:
    """The tokens as Python numbers, which dictionaries look up faster than numpy's."""
    for first in range(0, len(tokens), _PART):
        yield from tokens[first : first + _PART].tolist()


def _summary(texts: Sequence[Sequence[int]], copies: list[list[int]], tokenizer: Tokenizer) -> Copies:
    best = [max(lengths, default=0) for lengths in copies]
    longest = max(best)
    text = best.index(longest)
    end = copies[text].index(longest) + 1 if longest else 0
    passage = tokenizer.decode(list(texts[text][end - longest : end]))
    return Copies(len(texts), sum(map(len, texts)), longest, statistics.median(best), passage)


ROOT = 0


class SuffixAutomaton:
    """All substrings of one sequence of tokens.

    A state stands for the substrings that end at the same places of the sequence. The longest of them has `length[s]`
    tokens. The shortest has one token more than the longest of state `link[s]`, whose substrings end at more places.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.following: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.prefixes: list[int] = []
        """The state of each prefix: entry i belongs to the first i + 1 tokens."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        before = self.prefixes[-1] if self.prefixes else ROOT
        new = self._add_state(self.length[before] + 1, {}, ROOT)
        self.prefixes.append(new)
        state = before
        while state >= 0 and token not in self.following[state]:
            self.following[state][token] = new
            state = self.link[state]
        if state < 0:
            return
        target = self.following[state][token]
        if self.length[target] == self.length[state] + 1:
            self.link[new] = target
            return
        # The shorter substrings of `target` now end at one place more than its longer ones: they get their own state.
        split = self._add_state(self.length[state] + 1, dict(self.following[target]), self.link[target])
        while state >= 0 and self.following[state].get(token) == target:
            self.following[state][token] = split
            state = self.link[state]
        self.link[target] = self.link[new] = split

    def _add_state(self, length: int, following: dict[int, int], link: int) -> int:
        self.length.append(length)
        self.following.append(following)
        self.link.append(link)
        return len(self.length) - 1

    def longest_matches(self, other: Iterable[int]) -> list[int]:
        """For each position of the sequence, the length of the longest substring that ends there and is in `other`."""
        found = [0] * len(self.length)
        state, matched = ROOT, 0
        for token in other:
            while state != ROOT and token not in self.following[state]:
                state = self.link[state]
                matched = self.length[state]
            if token in self.following[state]:
                state, matched = self.following[state][token], matched + 1
                found[state] = max(found[state], matched)
        # What was matched in a state ends wherever the shorter substrings of its links end, and these are in it.
        for s in sorted(range(1, len(found)), key=self.length.__getitem__, reverse=True):
            if found[s] and self.link[s] != ROOT:
                found[self.link[s]] = self.length[self.link[s]]
        for s in sorted(range(1, len(found)), key=self.length.__getitem__):
            found[s] = found[s] or found[self.link[s]]
        return [found[s] for s in self.prefixes]


def longest_copies(texts: Sequence[Sequence[int]], source: Iterable[int]) -> list[list[int]]:
    """For each position of each text, the length of the longest passage that ends there and occurs in `source`.

    Lengths are in tokens. Tokens are not negative. No passage goes over the end of a text.
    """
    joined: list[int] = []
    for number, text in enumerate(texts):
        joined += [*text, -1 - number]  # an end of its own, which is in no other text
    lengths, copies, first = SuffixAutomaton(joined).longest_matches(source), [], 0
    for text in texts:
        copies.append(lengths[first : first + len(text)])
        first += len(text) + 1
    return copies


def run(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the best one unless given")
    parser.add_argument("--texts", type=int, default=32, help="texts that the model writes")
    asked = parser.parse_args(argv)
    environment.prepare_environment()
    from moe_jax.data.token_store import stored_documents
    from moe_jax.inference.sampling import Sampling

    loaded, generator = open_writer(asked.run, asked.step)
    store, changed = loaded.validation_text()
    if changed:
        print(f"warning: {changed}", file=sys.stderr)
    written = (
        "".join(generator.pieces("", Sampling(), seed=0, number=number, limit=LONGEST_TEXT))
        for number in range(asked.texts)
    )
    texts = [loaded.tokenizer.encode(text) for text in written]
    documents = (loaded.tokenizer.encode(text) for text in stored_documents(store.valid.tokens, loaded.tokenizer))
    pieces = pieces_of(documents, [len(text) for text in texts])
    own, beside = measure(texts, pieces, store.train.tokens, loaded.tokenizer)
    print(own.describe("texts of the model"))
    if beside is not None:
        print(beside.describe("pieces of the validation text, cut to the same lengths"))
    print(f"the longest passage of the model: {own.passage!r}\ncheckpoint of step {loaded.checkpoint.step}")
    if len(store.train.tokens) > MOST_TOKENS:
        print(f"only the first {MOST_TOKENS:,} of {len(store.train.tokens):,} training tokens were searched")
    print(json_text({"model": own.to_json(), "validation": None if beside is None else beside.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
