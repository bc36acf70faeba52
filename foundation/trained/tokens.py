"""`tokenizer.json` of a run: text to token ids and back.

A `bpe` file is a list of merges, applied as in chapter 20. Ids 0 to 255 are the bytes; merge (a, b) makes a new entry,
the bytes of a and then those of b. A text is cut into words first, by the rule of GPT-2. The last id is the separator
between two documents.
"""

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from foundation.byte_pairs import encode
from foundation.trained import Problem

SEPARATOR = "<|endoftext|>"


class Vocabulary:
    """The entries of a tokenizer, and the two ways through them."""

    def __init__(self, entries: list[bytes], encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        """The ids of a text, without a separator."""
        self.separator = len(entries)
        self.size = self.separator + 1
        """Ids, the separator included."""
        self._entries = [*entries, SEPARATOR.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no character become U+FFFD."""
        return b"".join(self._entries[i] for i in ids).decode(errors="replace")


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer of a run. Raises Problem where the file is missing, damaged, or of an unknown kind."""
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        kind = definition["kind"]
        if kind == "byte":
            return _of_pairs([], lambda text: [text])
        if kind == "bpe":
            return _of_pairs([(a, b) for a, b in definition["merges"]], words)
        if kind == "gpt2":
            return _gpt2()
        if kind == "hf":
            what = "an imported tokenizer, which foundation does not read"
            raise Problem(f"{path}: {what}; choose a run with --tokenizer bpe, byte or gpt2")
        raise ValueError(f"unknown kind {kind}")
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Problem(f"{path}: damaged ({error}); take it from the run again") from None


def _of_pairs(pairs: list[tuple[int, int]], cut: Callable[[str], list[str]]) -> Vocabulary:
    of_word = cache(lambda word: encode(word.encode(), pairs))
    entries = [bytes([byte]) for byte in range(256)]
    for a, b in pairs:
        entries.append(entries[a] + entries[b])
    return Vocabulary(entries, lambda text: [i for word in cut(text) for i in of_word(word)])


def words(text: str) -> list[str]:
    """The pieces that a merge never crosses."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [text[begin:end] for _, (begin, end) in ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


def _gpt2() -> Vocabulary:
    """GPT-2's tokenizer, which the run's file does not hold."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:
        name = type(error).__name__
        raise Problem(f"the GPT-2 vocabulary cannot be had ({name}); set TIKTOKEN_CACHE_DIR to its folder") from None
    entries = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return Vocabulary(entries, encoding.encode_ordinary)
