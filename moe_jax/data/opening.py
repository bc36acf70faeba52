"""The words that a sample of text begins with: those that the validation text begins with.

A model continues what looks like its text. A fixed prompt, such as "Once upon a time", suits one corpus only.
"""

import re

import numpy as np

from moe_jax.data.shards import TokenArray
from moe_jax.data.tokenizers import Tokenizer

WORDS = 4
LONGEST = 48
"""Characters."""
_TOKENS = 256  # looked at; a byte tokenizer needs up to four for a character
_SEARCHED, _DOCUMENTS = 1 << 16, 50
"""Tokens and documents in which different openings are looked for."""
_FIRST_WORDS = re.compile(rf"\S+(?:[ \t]+\S+){{0,{WORDS - 1}}}")


def opening_words(tokenizer: Tokenizer, tokens: TokenArray) -> str:
    """Up to four words of the first line of the first document in a stream `separator, document, separator, ...`."""
    document = np.asarray(tokens[1 : 1 + _TOKENS])
    ends = np.flatnonzero(document == tokenizer.separator_id)
    if len(ends):
        document = document[: ends[0]]
    text = tokenizer.decode(document.tolist()).lstrip().rstrip("\ufffd")  # the last character may be cut
    found = _FIRST_WORDS.match(text.partition("\n")[0])
    return found[0][:LONGEST] if found else ""


def openings(tokenizer: Tokenizer, tokens: TokenArray, most: int) -> list[str]:
    """The opening words of the first documents of such a stream, each once, at most `most` of them."""
    head = np.asarray(tokens[: _SEARCHED + _TOKENS])
    starts = np.flatnonzero(head[:_SEARCHED] == tokenizer.separator_id)[:_DOCUMENTS]
    found: dict[str, None] = {}
    for start in starts:
        found.setdefault(opening_words(tokenizer, head[start:]))
    return [words for words in found if words][:most]
