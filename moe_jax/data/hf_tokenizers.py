"""The tokenizer.json of a Hugging Face folder, read by the library `tokenizers`: its vocabulary as bytes, its encoder.

Two kinds are known, both BPEs:

    byte-level      the bytes of a text are spelled with 256 printable characters (GPT-2, Llama 3, Qwen, OLMoE, SmolLM)
    with spaces as "▁"   characters, and single bytes where there is none (Llama 2, Mistral, Mixtral)

Added tokens that are special, such as `<|im_start|>`, are ordinary text inside a document, as our separator is. What is
not lossless: a byte-level tokenizer may bring a text into Unicode's form NFC first. One of the other kind puts a space
before a document, and reads "▁" as a space. Any other loss is refused: see `probe` and `encoder`.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_jax.config import UserError

if TYPE_CHECKING:
    import tokenizers

MOST_IDS = 1 << 20
"""Ids that a tokenizer may have. The largest public ones have 262,144."""
_MOST_PATTERN = 4000
"""Characters of all regular expressions in a file. The time to compile one grows with the square of its length, and
nothing can interrupt the library. Public tokenizers have a few hundred."""
SAMPLE = 1 << 20
"""Characters of a user's own text that an imported tokenizer must give back."""
_SPACE = "\u2581"
_PROBE = " ".join(map(chr, [*range(0x1000), *range(0x1000, 0x110000, 0x1000)])) + (
    "Once  upon \r\n\n\ta TIME, they'll (12345) na\u00efve \u65e5\u672c \U0001f600 cafe\u0301s: ``a'' <>{}~\u00a0.  "
)
"""A text that a tokenizer must give back: every byte that UTF-8 has, letters, marks, and white space of many kinds."""


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it in GPT-2's vocabulary files (Radford et al. 2019, encoder.py).

    Bytes that are printable in Latin-1 stand for themselves, the others for characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTES = {character: byte for byte, character in byte_alphabet().items()}


def library_of(file: str) -> "tokenizers.Tokenizer":
    """The library's tokenizer of the text of a tokenizer.json. Raises UserError unless it is a BPE."""
    import tokenizers

    patterns: list[str] = []
    with one_line():
        json.loads(file, object_pairs_hook=lambda pairs: patterns.extend(str(v) for n, v in pairs if n == "Regex"))
        if (size := sum(map(len, patterns))) > _MOST_PATTERN:
            raise ValueError(f"regular expressions of {size:,} characters, at most {_MOST_PATTERN:,} are read")
        library = tokenizers.Tokenizer.from_str(file)
    if not isinstance(library.model, tokenizers.models.BPE) or library.model.dropout:
        raise UserError("tokenizer.json: must be a BPE without dropout; no other kind can be imported")
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # else `<|endoftext|>` inside a document would end it
    return library


def entries(library: "tokenizers.Tokenizer") -> list[bytes]:
    """The bytes of each id. An id without an entry has none. Raises UserError if there is no entry, or too high an
    id."""
    ids, spell = library.get_vocab(with_added_tokens=True), _byte_level if _is_byte_level(library) else _with_spaces
    most = max(ids.values(), default=-1)
    if not 0 <= most < MOST_IDS:
        raise UserError(f"tokenizer.json: its highest id is {most}, must be from 0 to {MOST_IDS - 1:,}")
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    words = {i: word.encode(errors="replace") if word in added else spell(word) for word, i in ids.items()}
    return [words.get(i, b"") for i in range(most + 1)]


def probe(library: "tokenizers.Tokenizer") -> str:
    """A text that an imported tokenizer must give back, with spaces beside each token that would remove them."""
    stripping = [t.content for t in library.get_added_tokens_decoder().values() if t.lstrip or t.rstrip]
    return _PROBE + "".join(f"a  {content}  " for content in stripping)


def encoder(
    library: "tokenizers.Tokenizer", entries: list[bytes], separator: int, sample: int
) -> Callable[[list[str]], list[list[int]]]:
    """Texts to lists of ids. It raises UserError for a text that would give the separator, which only ends texts; and
    for one of the first `sample` characters of text if the entries of its ids are not the text."""

    def encode_batch(texts: list[str]) -> list[list[int]]:
        nonlocal sample
        with one_line():
            rows = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
        for text, ids in zip(texts, rows, strict=True):
            if separator in ids:
                raise UserError(
                    f"tokenizer.json: reads a part of the text {text[:40]!r} as token {separator}, which ends texts; "
                    "take that part out of the text"
                )
            if sample > 0:
                sample -= len(text)
                _check_kept(text, b"".join([entries[i] for i in ids]).decode(errors="replace"), _is_byte_level(library))
        return rows

    return encode_batch


def _check_kept(text: str, back: str, byte_level: bool) -> None:
    """Raise UserError unless a text came back, but for what the kinds may change."""
    if not byte_level:
        text = text.replace(_SPACE, " ")
    if back in (text, unicodedata.normalize("NFC", text) if byte_level else " " + text):
        return
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
    raise UserError(
        f"tokenizer.json: makes {back[at:][:20]!r} of the text {text[at:][:20]!r}; it must be a byte-level BPE, or one "
        "with byte_fallback and spaces as U+2581, that keeps every character"
    )


@contextmanager
def one_line() -> Iterator[None]:
    """Turn an error of the library into UserError. It raises `Exception`, and what Rust calls a panic, a BaseException,
    such as for a regular expression that backtracks without end."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"tokenizer.json: cannot be read ({' '.join(str(error).split())[:120]})") from None


def end_of_text(library: "tokenizers.Tokenizer", settings: str) -> int:
    """The id of the token that tokenizer_config.json names as `eos_token`. Raises UserError if there is none."""
    try:
        named = json.loads(settings).get("eos_token")
    except (ValueError, AttributeError, RecursionError):
        named = None
    content = named.get("content") if isinstance(named, dict) else named
    token = library.token_to_id(content) if isinstance(content, str) else None
    if token is None:
        raise UserError(
            "config.json: has no eos_token_id, and tokenizer_config.json no eos_token; name the token that ends a text"
        )
    return token


def _is_byte_level(library: "tokenizers.Tokenizer") -> bool:
    """Whether a part of the pre-tokenizer is byte-level."""
    return "ByteLevel" in str(library.pre_tokenizer)


def _byte_level(word: str) -> bytes:
    """The bytes of a word in GPT-2's alphabet. A special token may have other characters, and stands for itself."""
    try:
        return bytes([_BYTES[character] for character in word])
    except KeyError:
        return word.encode(errors="replace")


def _with_spaces(word: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", word):
        return bytes.fromhex(byte[1])
    return word.replace(_SPACE, " ").encode(errors="replace")
