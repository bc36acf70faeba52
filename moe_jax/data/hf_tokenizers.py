"""The tokenizer.json of a Hugging Face folder: its vocabulary as bytes, and its encoder.

Two kinds are known, both BPEs:

    byte-level      the bytes of a text are spelled with 256 printable characters (GPT-2, Llama 3, Qwen, OLMoE, SmolLM)
    with spaces as "▁"   characters, and single bytes where there is none (Llama 2, Mistral, Mixtral)

The library `tokenizers` encodes. Added tokens that are special, such as `<|im_start|>`, are ordinary text inside a
document, as our separator is. What is not lossless: a byte-level tokenizer may bring a text into Unicode's form NFC
first. One of the other kind puts a space before a document.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from moe_jax.config import UserError
from moe_jax.system.errors import shortened

MOST_IDS = 1 << 20
"""Ids that a tokenizer may have. The largest public ones have 262,144."""
_SPACE = "\u2581"
_PROBE = (
    "Once  upon \r\n\n\ta TIME, they'll (12345) na\u00efve \u65e5\u672c \U0001f600 cafe\u0301s: ``a'' <>{}~\u00a0.  "
)
"""A text that a tokenizer must give back: letters, marks, numbers and white space of many kinds."""


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it in GPT-2's vocabulary files (Radford et al. 2019, encoder.py).

    Bytes that are printable in Latin-1 stand for themselves, the others for characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def entries(file: str) -> list[bytes]:
    """The bytes of each id of a tokenizer.json. An id without an entry has none.

    Raises UserError if the file is no tokenizer, or one of another kind.
    """
    values = parse(file)
    ids, spell = _ids(values), _byte_level if _is_byte_level(values) else _with_spaces
    added = {token["content"] for token in values.get("added_tokens") or []}
    words = {i: word.encode(errors="replace") if word in added else spell(word) for word, i in ids.items()}
    if not words:
        raise UserError("tokenizer.json: model.vocab is empty; download the file again")
    return [words.get(i, b"") for i in range(max(words) + 1)]


def check_lossless(file: str, decode: Callable[[list[int]], str], encode: Callable[[str], list[int]]) -> None:
    """Raise UserError if a tokenizer does not give a text back. A byte-level one may compose its characters (NFC). One
    of the other kind may put a space before it."""
    expected = [_PROBE, unicodedata.normalize("NFC", _PROBE)] if _is_byte_level(parse(file)) else [_PROBE, " " + _PROBE]
    back = decode(encode(_PROBE))
    if back not in expected:
        raise UserError(
            f"tokenizer.json: makes {back!r} of the text {_PROBE!r}; it must be a byte-level BPE, or one with "
            "byte_fallback and spaces as U+2581, that keeps every character"
        )


def _is_byte_level(values: dict[str, Any]) -> bool:
    """Whether a part of the pre-tokenizer is byte-level."""
    return '"ByteLevel"' in json.dumps(values.get("pre_tokenizer"))


def encoder(file: str, separator: int) -> Callable[[list[str]], list[list[int]]]:
    """Texts to lists of ids. Raises UserError if the library refuses the file; the encoder raises it for a text that
    would give the separator, which only ends texts."""
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(file)
    except BaseException as error:  # the library raises `Exception`, and panics as a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"tokenizer.json: cannot be read ({' '.join(str(error).split())[:120]})") from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # else `<|endoftext|>` inside a document would end it

    def encode_batch(texts: list[str]) -> list[list[int]]:
        rows = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
        for text, ids in zip(texts, rows, strict=True):
            if separator in ids:
                raise UserError(
                    f"tokenizer.json: reads a part of the text {text[:40]!r} as token {separator}, which ends texts; "
                    "take that part out of the text"
                )
        return rows

    return encode_batch


def end_of_text(file: str, settings: str) -> int:
    """The id of the token that tokenizer_config.json names as `eos_token`. Raises UserError if there is none."""
    try:
        named = json.loads(settings).get("eos_token")
    except (ValueError, AttributeError, RecursionError):
        named = None
    content = named.get("content") if isinstance(named, dict) else named
    token = _ids(parse(file)).get(content) if isinstance(content, str) else None
    if token is None:
        raise UserError(
            "config.json: has no eos_token_id, and tokenizer_config.json no eos_token; name the token that ends a text"
        )
    return token


def spelling(file: str, i: int) -> str:
    """The word of an id as the file spells it; of an added token, that one. Raises UserError if the id has none."""
    words = {there: word for word, there in _ids(parse(file)).items()}
    if i not in words:
        raise UserError(f"tokenizer.json: has no entry for the id {i}")
    return words[i]


def parse(file: str) -> dict[str, Any]:
    """The content of a tokenizer.json: an object with the vocabulary of a BPE. Raises UserError for anything else."""
    try:
        values = json.loads(file)
    except (ValueError, RecursionError):
        raise UserError("tokenizer.json: is not JSON; download the file again") from None
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        raise UserError("tokenizer.json: has no model; download the file again")
    plain: dict[str, Any] = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    for name, allowed in plain.items():
        if model.get(name) and model[name] != allowed:
            raise _unknown(f"model.{name}", model[name], allowed or "null")
    if not isinstance(model.get("vocab"), dict) or not isinstance(values.get("added_tokens") or [], list):
        raise UserError("tokenizer.json: model.vocab or added_tokens is of the wrong type; download the file again")
    return values


def _ids(values: dict[str, Any]) -> dict[str, int]:
    """Word -> id, the added tokens last."""
    ids = dict(values["model"]["vocab"])
    for token in values.get("added_tokens") or []:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise _unknown("added_tokens", token, "of a known form")
        ids[token["content"]] = token.get("id")
    for i in ids.values():
        if type(i) is not int or not 0 <= i < MOST_IDS:
            raise UserError(f"tokenizer.json: a token has the id {str(i)[:40]}, must be from 0 to {MOST_IDS - 1:,}")
    return ids


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


_BYTES = {character: byte for byte, character in byte_alphabet().items()}


def _unknown(name: str, value: Any, allowed: str) -> UserError:
    text = shortened(json.dumps(value, ensure_ascii=True), 80)
    return UserError(f"tokenizer.json: {name} is {text}, must be {allowed}; no other kind can be imported")
