"""A word-trigram model that assigns a probability to the exact bytes of a text: a baseline for the embedded corpus.

Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999) over words. With c(.) the number of times
that a trigram occurs, and N(.) the number of different n-grams that fit a pattern,

    P(w | u v) = (max(c(u v w) - d3, 0) + d3 N(u v *) P(w | v)) / c(u v *)
    P(w | v)   = (max(N(* v w) - d2, 0) + d2 N(v *)   P(w))     / N(* v *)
    P(w)       = (max(N(* w)   - d1, 0) + d1 N(*)     S(w))     / N(* *)

For a context that was never seen, a line equals the probability P or S of the line below it. The discount d of a line
is n1 / (n1 + 2 n2), where n1 counts of the line are 1 and n2 counts are 2. If no count is 1, d is 1/2. S(w) is the
probability of spelling the word w: each of its bytes, and its end, has probability 1/257. So S sums to 1 over all byte
strings, and a word that was never seen still has a probability.

A word is a run of letters with the space before it, or any other single character. So the words of a text, joined, are
the text, byte for byte. The empty word ends a story.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

END = ""
"""The word that ends a story. It also stands twice before the first word, as context."""

_WORD = re.compile(r" ?[^\W\d_]+|.", re.DOTALL)


def words_of(text: str) -> list[str]:
    """The words of a text. Joined, they give the text."""
    return _WORD.findall(text)


def spelling_probability(word: str) -> float:
    """S(w), which sums to 1 over all byte strings: uniform over 256 bytes and the end of the word."""
    return 257.0 ** -(len(word.encode()) + 1)


class TrigramModel:
    """An interpolated Kneser-Ney model of stories."""

    def __init__(self, stories: Iterable[str]) -> None:
        trigrams: Counter[tuple[str, str, str]] = Counter()
        for story in stories:
            trigrams.update(_trigrams(story))
        bigrams = Counter((v, w) for _, v, w in trigrams)
        unigrams = Counter((w,) for _, w in bigrams)
        self._levels = [_Level(counts) for counts in (unigrams, bigrams, trigrams)]
        self.vocabulary = [w for (w,) in unigrams]
        """Every word of the training text, the end of a story included."""

    def probability(self, word: str, before: tuple[str, str]) -> float:
        """P(word | the two words before it)."""
        p = spelling_probability(word)
        for level, context in zip(self._levels, ((), before[1:], before), strict=True):
            p = level.interpolate((*context, word), p)
        return p

    def bits(self, stories: Iterable[str]) -> float:
        """Code length of stories and their ends, in bits."""
        counts = Counter(trigram for story in stories for trigram in _trigrams(story))
        return -math.fsum(count * math.log2(self.probability(w, (u, v))) for (u, v, w), count in counts.items())


def trigram_bits_per_byte(train_stories: Iterable[str], valid_stories: Sequence[str]) -> float:
    """Code length of the validation stories and their ends under a trigram model of the training stories, in bits,
    divided by the UTF-8 bytes of the validation stories."""
    return TrigramModel(train_stories).bits(valid_stories) / sum(len(story.encode()) for story in valid_stories)


def _trigrams(story: str) -> Iterable[tuple[str, str, str]]:
    words = [END, END, *words_of(story), END]
    return zip(words, words[1:], words[2:], strict=False)


class _Level:
    """The counts of one line of the formula, and the sums of counts that the line needs."""

    def __init__(self, counts: Mapping[tuple[str, ...], int]) -> None:
        self._counts = counts
        self._totals: Counter[tuple[str, ...]] = Counter()
        for ngram, count in counts.items():
            self._totals[ngram[:-1]] += count
        self._kinds = Counter(ngram[:-1] for ngram in counts)
        once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
        self._discount = once / (once + 2 * twice) if once else 0.5

    def interpolate(self, ngram: tuple[str, ...], lower: float) -> float:
        """P(last word | the words before it). `lower` is the probability of the last word in the line below."""
        context = ngram[:-1]
        total = self._totals[context]
        if total == 0:
            return lower
        kept = max(self._counts.get(ngram, 0) - self._discount, 0.0)
        return (kept + self._discount * self._kinds[context] * lower) / total
