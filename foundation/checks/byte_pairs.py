"""Checks of chapter 20: byte pairs."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from foundation import byte_pairs
from foundation.byte_pairs import Pair, Word
from foundation.checks.inputs import Draws
from foundation.parity import OracleCheck


def checks() -> Iterator[OracleCheck]:
    """Counts, replacements and spellings against Python's strings; what is learned against the `tokenizers` library.

    Words of two or three letters, because there pairs overlap, tie and return.
    """
    draws = Draws("byte pairs")
    for letters in (2, 3):
        words = drawn_words(draws, letters)
        yield OracleCheck("pair_counts", f"{letters} letters", table_of(byte_pairs.pair_counts), by_place, (), (words,))
        pairs = byte_pairs.learn(words, 12)
        yield OracleCheck("learn", f"{letters} letters", as_array(byte_pairs.learn), by_library, (), (words, 12))
        for number, word in enumerate(list(words)[:3]):
            case = f"{letters} letters, word {number}"
            first = (word[0], word[0])
            yield OracleCheck("replaced", case, as_array(byte_pairs.replaced), by_string, (), (word * 3, first, 300))
            long = bytes(word) * 3
            yield OracleCheck("encode", case, as_array(byte_pairs.encode), in_order, (), (long, pairs))
            pieces = in_order(long, pairs)
            yield OracleCheck("spelled", case, letters_of, lambda *_, b=long: np.array(list(b)), (), (pieces, pairs))


def drawn_words(draws: Draws, letters: int) -> Counter[Word]:
    """40 random words with their counts."""
    generator = draws.generator
    words: Counter[Word] = Counter()
    for _ in range(40):
        word = tuple(int(i) for i in 97 + generator.integers(0, letters, generator.integers(2, 9)))
        words[word] += int(generator.integers(1, 6))
    return words


def table_of(count: Callable[..., Counter[Pair]]) -> Callable[..., np.ndarray]:
    """The counts of the nine pairs of a, b and c."""
    return lambda words: np.array([[count(words)[i, j] for j in (97, 98, 99)] for i in (97, 98, 99)])


def as_array(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    return lambda *arguments: np.array(function(*arguments))


def letters_of(word: Any, pairs: Any) -> np.ndarray:
    return np.array(list(byte_pairs.spelled(tuple(int(i) for i in word), pairs)))


def by_place(words: Mapping[Word, int]) -> np.ndarray:
    """Each pair as a string, looked for at every place of every word."""
    texts = {bytes(word).decode(): times for word, times in words.items()}
    return np.array(
        [
            [sum(n * sum(t.startswith(i + j, at) for at in range(len(t))) for t, n in texts.items()) for j in "abc"]
            for i in "abc"
        ]
    )


def by_string(word: Word, pair: Pair, number: int) -> np.ndarray:
    """`str.replace`, which goes from left to right too."""
    text = "".join(map(chr, word)).replace(chr(pair[0]) + chr(pair[1]), chr(number))
    return np.array([ord(letter) for letter in text])


def in_order(text: bytes, pairs: list[Pair]) -> np.ndarray:
    """The whole list from its beginning, each pair replaced everywhere."""
    word = text.decode("latin-1")
    for i, (left, right) in enumerate(pairs):
        word = word.replace(chr(left) + chr(right), chr(256 + i))
    return np.array([ord(letter) for letter in word])


def by_library(words: Mapping[Word, int], most: int) -> np.ndarray:
    """The pairs that the `tokenizers` library learns from the same words.

    In these words no two pairs spell the same string. The library would give both one number.
    """
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    letters = {letter for word in words for letter in word}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=len(letters) + most, show_progress=False)
    model.train_from_iterator([" ".join([bytes(word).decode()] * times) for word, times in words.items()], trainer)
    number = {chr(letter): letter for letter in letters}
    pairs = []
    for left, right in json.loads(model.to_str())["model"]["merges"]:
        pairs.append((number[left], number[right]))
        assert left + right not in number
        number[left + right] = 255 + len(pairs)
    return np.array(pairs)
