"""How long the passages are that a model's texts have in common with its training text.

Every text repeats something: "Once upon a time, there was a little girl". So validation texts, which the model has not
seen, are measured beside it, cut to the same lengths where they are long enough. A model that has learned its training
text by heart has clearly longer copies than they have.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.data.shards import TokenArray
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.experiments.suffix_automaton import longest_copies

MOST_TOKENS = 20_000_000
"""Only the first tokens of a longer training text are searched, to stay within about fifteen seconds."""
_PART = 1 << 16


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
    texts: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]], train: TokenArray, tokenizer: Tokenizer
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


def _in_parts(tokens: TokenArray) -> Iterator[int]:
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
