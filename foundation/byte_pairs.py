"""Byte-pair encoding from scratch. Derived in chapter 20.

Begin with bytes. The most frequent pair of neighbours gets a new number and is replaced everywhere, from left to right,
as often as one likes. The list of pairs is the tokenizer. Of equally frequent pairs the one with the smaller numbers is
taken. No pair spans two words, so each different word is counted once, times its occurrences.

A new word is encoded by the pair in it that was learned *first*, again and again.

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
