"""Reference values for a loss: the score of a trigram model over words, and the entropy floor of the embedded corpus.

The model is an interpolated modified Kneser-Ney model (Chen and Goodman 1998, section 3). With h the n - 1 words before
w, h' all of them but the first, and c the count of an n-gram,

    P(w | h) = (c(h w) - D(c(h w)) + (D1 N1(h) + D2 N2(h) + D3 N3(h)) P(w | h')) / c(h)

c is the number of occurrences for the longest n-grams. For the shorter ones it is the number of different words that
stand before them. c(h) is the sum of c(h w) over w. N1, N2 and N3 count the words w with c(h w) = 1, = 2 and >= 3; the
discounts D(0) = 0, D1, D2, D3 belong to the same counts, and each length has its own. After a context that was never
seen, P(w | h) = P(w | h'). Single words back off to the probability S(w) of spelling a word: each of its bytes, and its
end, has probability 1/257. So S sums to 1 over all byte strings, and a word that was never seen has a probability.

A word is a run of letters with the space before it, or any other single character. So the words of a text, joined, are
the text, byte for byte. The empty word ends a document.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from moe_jax.config import DataConfig
from moe_jax.data.token_store import Split, TokenStore, stored_documents
from moe_jax.system.files import cached_json
from moe_jax.system.terminal import working

END = ""
"""The word that ends a document. It also stands before the first word, as context."""

_WORD = re.compile(r" ?[^\W\d_]+|.", re.DOTALL)

TRAIN_BYTES, VALID_BYTES = 10_000_000, 1_000_000
"""The trigram model counts and scores the beginning of a longer text only, to stay within seconds and 600 MB."""


@dataclass(frozen=True)
class CorpusBaselines:
    """Scores on the validation text, in bits per UTF-8 byte."""

    trigram: float
    """The score of a model that has counted the training text, and sees the two words before."""
    entropy_floor: float | None = None
    """Exact code length of the embedded stories under the grammar that wrote them. On average no model scores lower.
    None for any other text."""

    def describe(self) -> str:
        """The scores in one sentence."""
        trigram = f"a trigram model of the training text scores {self.trigram:.4f} bits/byte"
        return trigram if self.entropy_floor is None else f"the best possible is {self.entropy_floor:.4f}; {trigram}"


def corpus_baselines(data: DataConfig, store: TokenStore) -> CorpusBaselines | None:
    """The scores for a corpus, kept in the cache. They take some seconds of one core. None for conversations.

    They come from the stored tokens: the source may need a network, and may have been edited.
    """
    if store.valid.answers is not None:
        return None
    embedded = data.source == "stories"

    def documents(split: Split, most_bytes: int) -> Iterator[str]:
        """All of the embedded stories; of another text its beginning, and at least one document."""
        size, tokens = 0, split.tokens if embedded else split.tokens[: 2 * most_bytes]  # a token has a byte or more
        for document in stored_documents(tokens, store.tokenizer):
            if size and size + len(document.encode()) > most_bytes and not embedded:
                return
            size += len(document.encode())
            yield document

    def scores() -> dict[str, Any]:
        floor = None
        if embedded:
            from moe_jax.data.synthetic.stories import VALIDATION_STORIES, entropy_floor_bits_per_byte

            floor = entropy_floor_bits_per_byte(data.stories_seed, "valid", VALIDATION_STORIES)
        with working("scoring a trigram model of the text, to compare with"):
            model = NgramModel(documents(store.train, TRAIN_BYTES), 3)
            return asdict(CorpusBaselines(model.bits_per_byte(list(documents(store.valid, VALID_BYTES))), floor))

    return CorpusBaselines(**cached_json("baselines", [store.digest, f"{embedded=}"], scores))


def words_of(text: str) -> list[str]:
    """The words of a text. Joined, they give the text."""
    return _WORD.findall(text)


def spelling_probability(word: str) -> float:
    """S(w), which sums to 1 over all byte strings: uniform over 256 bytes and the end of the word."""
    return 257.0 ** -(len(word.encode()) + 1)


type Ngram = tuple[str, ...]


def ngrams(document: str, order: int) -> Iterator[Ngram]:
    """Each word of a document, and its end, with the `order` - 1 words before it."""
    words = [*[END] * (order - 1), *map(sys.intern, words_of(document)), END]
    return zip(*(words[first:] for first in range(order)), strict=False)


class NgramModel:
    """The probability of a word after the `order` - 1 words before it, from the counts of some documents."""

    def __init__(self, documents: Iterable[str], order: int) -> None:
        self.order = order
        counts = Counter(chain.from_iterable(ngrams(document, order) for document in documents))
        self._levels: list[_Level] = []
        for _ in range(order):
            self._levels.insert(0, _Level(counts))
            counts = Counter(ngram[1:] for ngram in counts)  # each different word before it counts once

    def probability(self, ngram: Ngram) -> float:
        """The probability of the last word of an n-gram."""
        p = spelling_probability(ngram[-1])
        for length, level in enumerate(self._levels, 1):
            p = level.interpolate(ngram[-length:], p)
        return p

    def bits_per_byte(self, documents: Sequence[str]) -> float:
        """The code length of documents and of their ends in bits, divided by the UTF-8 bytes of the documents."""
        scored = chain.from_iterable(ngrams(document, self.order) for document in documents)
        bits = -math.fsum(math.log2(self.probability(ngram)) for ngram in scored)
        return bits / sum(len(document.encode()) for document in documents)


class _Level:
    """The n-grams of one length: one line of the formula."""

    def __init__(self, counts: Counter[Ngram]) -> None:
        self._counts, self._discounts = counts, _discounts(counts)
        self._total: dict[Ngram, int] = defaultdict(int)
        """Of each context, the sum of its counts."""
        self._saved: dict[Ngram, float] = defaultdict(float)
        """Of each context, the sum of its discounts."""
        for ngram, count in counts.items():
            self._total[ngram[:-1]] += count
            self._saved[ngram[:-1]] += self._discounts[min(count, 3)]

    def interpolate(self, ngram: Ngram, lower: float) -> float:
        """P(w | h). `lower` is P(w | h')."""
        context, count = ngram[:-1], self._counts.get(ngram, 0)
        if context not in self._total:
            return lower
        kept = count - self._discounts[min(count, 3)]
        return (kept + self._saved[context] * lower) / self._total[context]


def _discounts(counts: Counter[Ngram]) -> list[float]:
    """D(0), D1, D2 and D3 of n-grams of one length (Chen and Goodman 1998, equation 26).

    With n1 to n4 the numbers of n-grams that occur 1 to 4 times, Y = n1 / (n1 + 2 n2) and Dk = k - (k + 1) Y n(k+1) /
    nk. If nk is 0 or Dk is not positive, Dk is Y: with a discount of 0 a word that is new after a context would have
    probability 0. If n1 is 0, Y is 1/2.
    """
    n = Counter(counts.values())
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
    discounts = [k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.0 for k in (1, 2, 3)]
    return [0.0, *(d if d > 0 else y for d in discounts)]
