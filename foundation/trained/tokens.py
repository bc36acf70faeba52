"""`tokenizer.json` of a run: text to token ids and back.

A `bpe` file is a list of merges. Ids 0 to 255 are the bytes; merge (a, b) makes a new entry, the bytes of a and then
those of b. To encode, a text is cut into words, and in each word the pair of neighbours whose entry is oldest is
joined, again and again, until no two neighbours have one. The last id is the separator between two documents.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from foundation.trained import Problem

SEPARATOR = "<|endoftext|>"

_CONTRACTION = re.compile(r"'(?:[sdmt]|ll|ve|re)")
# GPT-2's rule, on the kinds of the characters: L letter, N number, _ space, s other white space, o anything else.
_WORD = re.compile(r"_?L+|_?N+|_?o+|[_s]+$|[_s]+(?![^_s])|[_s]")


class Vocabulary:
    """The entries of a tokenizer, and the two ways through them."""

    def __init__(self, entries: list[bytes], merges: bool) -> None:
        self.entries = entries
        self.separator = len(entries)
        self._ids = {entry: i for i, entry in enumerate(entries)}
        self._merges = merges
        self._encode_word = lru_cache(1 << 16)(self._join)

    @property
    def size(self) -> int:
        """Ids, the separator included."""
        return len(self.entries) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a separator."""
        if not self._merges:
            return list(text.encode())
        return [i for word in words(text) for i in self._encode_word(word.encode())]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no character become U+FFFD."""
        entries = [*self.entries, SEPARATOR.encode()]
        return b"".join(entries[i] for i in ids).decode(errors="replace")

    def _join(self, word: bytes) -> tuple[int, ...]:
        if word in self._ids:
            return (self._ids[word],)
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            ranks = [self._ids.get(a + b, self.size) for a, b in pairwise(parts)]
            first = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[first] == self.size:
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        return tuple(self._ids[part] for part in parts)


def words(text: str) -> Iterator[str]:
    """The pieces that a merge never crosses."""
    kinds = "".join(map(_kind, text))
    at = 0
    while at < len(text):
        found = _CONTRACTION.match(text, at) or _WORD.match(kinds, at)
        end = found.end() if found else at + 1
        yield text[at:end]
        at = end


def _kind(character: str) -> str:
    if character == " ":
        return "_"
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":
        return "s"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "o"


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer of a run. Raises Problem where the file is missing, damaged, or of an unknown kind."""
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        kind = definition["kind"]
        entries = [bytes([byte]) for byte in range(256)]
        if kind == "bpe":
            for a, b in definition["merges"]:
                entries.append(entries[a] + entries[b])
        elif kind == "gpt2":
            entries = _entries_of_gpt2()
        elif kind == "hf":
            raise Problem(
                f"{path}: an imported tokenizer, which foundation does not read; choose a run with --tokenizer bpe, "
                "byte or gpt2"
            )
        elif kind != "byte":
            raise ValueError(f"unknown kind {kind}")
        return Vocabulary(entries, kind != "byte")
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Problem(f"{path}: damaged ({error}); take it from the run again") from None


def _entries_of_gpt2() -> list[bytes]:
    """GPT-2's vocabulary, which the run's file does not hold."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:
        name = type(error).__name__
        raise Problem(f"the GPT-2 vocabulary cannot be had ({name}); set TIKTOKEN_CACHE_DIR to its folder") from None
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
