"""The tokenizer.json of a Hugging Face folder, read by the library `tokenizers`: its vocabulary as bytes, its encoder.

Two kinds are known, both BPEs:

    byte-level      the bytes of a text are spelled with 256 printable characters (GPT-2, Llama 3, Qwen, OLMoE, SmolLM)
    with spaces as "▁"   characters, and single bytes where there is none (Llama 2, Mistral, Mixtral)

Added tokens that are special, such as `<|im_start|>`, are ordinary text inside a document, as our separator is. What is
not lossless: a byte-level tokenizer may bring a text into Unicode's form NFC first. One of the other kind puts a space
before a document, and reads "▁" as a space. Any other loss is refused: see `check_lossless`.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_jax.config import UserError
from moe_jax.system.errors import shortened

if TYPE_CHECKING:
    import tokenizers

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

    with one_line():
        library = tokenizers.Tokenizer.from_str(file)
    if not isinstance(library.model, tokenizers.models.BPE) or library.model.dropout:
        raise UserError("tokenizer.json: must be a BPE without dropout; no other kind can be imported")
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # else `<|endoftext|>` inside a document would end it
    return library


def vocabulary(file: str, separator: int) -> tuple[list[bytes], Callable[[list[str]], list[list[int]]]]:
    """The bytes of each id of a tokenizer.json, and its encoder, texts to lists of ids. An id without an entry has no
    bytes.

    Raises UserError if there is no id `separator`. So does the encoder for a text that would give the separator, which
    only ends texts.
    """
    library = library_of(file)
    ids, spell = (
        library.get_vocab(with_added_tokens=True),
        _byte_level if "ByteLevel" in str(library.pre_tokenizer) else _with_spaces,
    )
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    words = {i: word.encode(errors="replace") if word in added else spell(word) for word, i in ids.items()}
    entries = [words.get(i, b"") for i in range(max(words, default=-1) + 1)]
    if not 0 <= separator < len(entries):
        raise UserError(f"tokenizer.json: has {len(entries)} ids, and the token that ends a text is {separator}")

    def encode_batch(texts: list[str]) -> list[list[int]]:
        with one_line():
            rows = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
        for text, ids in zip(texts, rows, strict=True):
            if separator in ids:
                raise UserError(
                    f"tokenizer.json: reads a part of the text {text[:40]!r} as token {separator}, which ends texts; "
                    "take that part out of the text"
                )
        return rows

    return entries, encode_batch


def check_lossless(file: str, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]) -> None:
    """Raise UserError unless the ids of a text of many characters give it back, but for what the kinds may change, and
    no rule of the tokenizer.json loses a part of other texts."""
    if lossy := next(_lossy(json.loads(file)), None):
        raise UserError(f"tokenizer.json: {lossy}, so a text would not come back; no such tokenizer can be imported")
    if _comparable(decode(encode(_PROBE))) != _comparable(_PROBE):
        raise UserError(
            "tokenizer.json: does not give every character of a text back; it must be a byte-level BPE, or one with "
            "byte_fallback and spaces as U+2581"
        )


def _comparable(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace(_SPACE, " ").removeprefix(" ")


def _lossy(part: Any) -> Iterator[str]:
    """What a part of tokenizer.json does to some texts that cannot be undone. The probe of `check_lossless` has not all
    texts: a rule may change a single word."""
    if isinstance(part, dict):
        if part.get("type") == "Replace" and part.get("pattern") not in ({"String": " "}, {"String": _SPACE}):
            yield f"replaces {shortened(str(part.get('pattern')))}"
        if part.get("behavior") == "Removed" and not part.get("invert"):
            yield f"removes {shortened(str(part.get('pattern')))}"
        if "content" in part and not part.get("special") and (part.get("lstrip") or part.get("rstrip")):
            yield f"removes the spaces beside {shortened(str(part['content']))}"
    for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _lossy(child)


@contextmanager
def one_line(problem: str = "tokenizer.json: cannot be read") -> Iterator[None]:
    """Turn what a library raises into UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
            raise
        why = shortened(" ".join(str(error).split()) or type(error).__name__, 160)
        raise UserError(f"{problem} ({why})") from None


def end_of_text(file: str, settings: dict[str, Any]) -> int:
    """The id of the token that tokenizer_config.json names as `eos_token`. Raises UserError if there is none."""
    named = settings.get("eos_token")
    token = library_of(file).token_to_id(str(named.get("content") if isinstance(named, dict) else named))
    if token is None:
        raise UserError(
            "config.json: has no eos_token_id, and tokenizer_config.json no eos_token; name the token that ends a text"
        )
    return token


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
