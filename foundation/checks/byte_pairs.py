"""Checks of chapter 20: byte pairs."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product

from foundation import byte_pairs
from foundation.byte_pairs import Pair, Word
from foundation.checks.inputs import Draws, answer
from foundation.parity import OracleCheck


def checks() -> Iterator[OracleCheck]:
    """Counts, replacements and spellings against Python's strings; what is learned against the `tokenizers` library.

    Words of two or three letters, because there pairs overlap, tie and return.
    """
    draws = Draws("byte pairs")
    for letters in (2, 3):
        words = drawn_words(draws, letters)
        yield answer(counts_of_nine, f"{letters} letters", by_place, (), words, operation="pair_counts")
        pairs = byte_pairs.learn(words, 12)
        yield answer(byte_pairs.learn, f"{letters} letters", by_library, (), words, 12)
        for number, word in enumerate(list(words)[:3]):
            case = f"{letters} letters, word {number}"
            first = (word[0], word[0])
            yield answer(byte_pairs.replaced, case, by_string, (), word * 3, first, 300)
            long = bytes(word) * 3
            yield answer(byte_pairs.encode, case, in_order, (), long, pairs)
            pieces = in_order(long, pairs)
            yield answer(letters_of, case, lambda *_, b=long: tuple(b), (), pieces, pairs, operation="spelled")


def drawn_words(draws: Draws, letters: int) -> Counter[Word]:
    """40 random words with their counts."""
    generator = draws.generator
    words: Counter[Word] = Counter()
    for _ in range(40):
        word = tuple(int(i) for i in 97 + generator.integers(0, letters, generator.integers(2, 9)))
        words[word] += int(generator.integers(1, 6))
    return words


def counts_of_nine(words: Mapping[Word, int]) -> list[int]:
    """The counts of the nine pairs of a, b and c."""
    counts = byte_pairs.pair_counts(words)
    return [counts[pair] for pair in product(b"abc", b"abc")]


def letters_of(word: Word, pairs: list[Pair]) -> tuple[int, ...]:
    return tuple(byte_pairs.spelled(word, pairs))


def by_place(words: Mapping[Word, int]) -> list[int]:
    """Each pair as a string, looked for at every place of every word."""
    texts = {bytes(word).decode(): times for word, times in words.items()}
    return [
        sum(times * sum(text.startswith(i + j, at) for at in range(len(text))) for text, times in texts.items())
        for i, j in product("abc", "abc")
    ]


def by_string(word: Word, pair: Pair, number: int) -> Word:
    """`str.replace`, which goes from left to right too."""
    text = "".join(map(chr, word)).replace(chr(pair[0]) + chr(pair[1]), chr(number))
    return tuple(map(ord, text))


def in_order(text: bytes, pairs: list[Pair]) -> Word:
    """The whole list from its beginning, each pair replaced everywhere."""
    word = text.decode("latin-1")
    for i, (left, right) in enumerate(pairs):
        word = word.replace(chr(left) + chr(right), chr(256 + i))
    return tuple(map(ord, word))


def by_library(words: Mapping[Word, int], most: int) -> list[Pair]:
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
    return pairs
