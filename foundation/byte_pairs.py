"""Byte-pair encoding from scratch: which pieces should a text be cut into?

A model reads whole numbers, so a text is cut into pieces that have numbers. Bytes always work, and make a text long.
Words make it short, and leave no number for a new one. Byte pairs lie between. Begin with bytes. Find the pair of
neighbours that is the most frequent, give it a new number, and replace it everywhere. Do this as often as you like. The
list of pairs is the **tokenizer**.

**Counting.** Neighbours are counted at every place, so "aaa" has the pair (a, a) twice, though only one of the two can
be replaced. That is what the programs in use do. Of equally frequent pairs the one with the smaller numbers is taken.
A text is cut into words before, and no pair spans two words; so it is enough to count each different word once and
multiply.

**Replacing** goes from left to right, and a replaced place is not looked at again: "aaa" becomes (aa, a).

**Encoding.** A new word is encoded by the same replacements in the same order. It need not go through the whole list.
Replace, as long as there is any pair of the list in the word, the one that was learned *first*. Both give the same. A
replacement makes new pairs only with the new number, and a pair with this number was learned later. So the earliest
pair that is present only ever moves to the back of the list, and a pair once passed never comes again.

**Nothing is lost.** Each number stands for a string of bytes, that of a pair for its left and then its right one. So a
text can be spelled out again, whatever the list is. And scores can be compared between tokenizers, if they are divided
by bytes. A loss by token cannot: with larger pieces there are fewer tokens, and each is harder to guess.

Sources: Gage 1994; Sennrich et al. 2016, section 3.2 and algorithm 1; Radford et al. 2019, section 2.2 (bytes).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

Word = tuple[int, ...]
"""The numbers of its pieces. 0 to 255 are bytes."""
Pair = tuple[int, int]
BYTES = 256


def pair_counts(words: Mapping[Word, int]) -> Counter[Pair]:
    """How often each pair of neighbours occurs. `words` says how often each word does."""
    counts: Counter[Pair] = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            counts[pair] += times
    return counts


def replaced(word: Word, pair: Pair, number: int) -> Word:
    """The word with `number` in place of the pair, from left to right."""
    out, place = [], 0
    while place < len(word):
        found = word[place : place + 2] == pair
        out.append(number if found else word[place])
        place += 2 if found else 1
    return tuple(out)


def learn(words: Mapping[Word, int], most: int) -> list[Pair]:
    """At most `most` pairs, in the order in which they are learned. Pair i has the number 256 + i."""
    pairs: list[Pair] = []
    while len(pairs) < most and (counts := pair_counts(words)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        number = BYTES + len(pairs)
        merged: Counter[Word] = Counter()
        for word, times in words.items():
            merged[replaced(word, best, number)] += times
        words = merged
        pairs.append(best)
    return pairs


def encode(text: bytes, pairs: Sequence[Pair]) -> Word:
    """The numbers of a word's pieces: of the pairs in the word, the one that was learned first is replaced first."""
    rank = {pair: i for i, pair in enumerate(pairs)}
    word: Word = tuple(text)
    while present := [rank[pair] for pair in pairwise(word) if pair in rank]:
        first = min(present)
        word = replaced(word, pairs[first], BYTES + first)
    return word


def spelled(word: Word, pairs: Sequence[Pair]) -> bytes:
    """The bytes that the pieces stand for."""
    strings = [bytes([byte]) for byte in range(BYTES)]
    for left, right in pairs:
        strings.append(strings[left] + strings[right])
    return b"".join(strings[number] for number in word)
