"""Documents as one stream of token ids: `separator, document, separator, ..., separator`."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.chats import encode_chats
from moe_jax.data.tokenizers import Tokenizer

_BATCH_BYTES = 1 << 22
"""Text encoded at a time. Tokenizers encode the documents of a batch side by side, each at most 1 MiB long."""
_READ_TOKENS = 1 << 20  # tokens looked at in a time
_OPENING_TOKENS, _OPENING_CHARACTERS = 256, 48
_FIRST_WORDS = re.compile(r"\S+(?:[ \t]+\S+){0,3}")
_SEARCHED, _DOCUMENTS = 1 << 16, 50
"""Tokens and documents in which different openings are looked for."""


class Stream(NamedTuple):
    """Tokens that are scored."""

    tokens: np.ndarray
    """uint16 or uint32 [N]."""
    answers: np.ndarray | None = None
    """bool [N]: the tokens that count. None if all of them do."""


class Encoded(NamedTuple):
    """Some documents of a stream, about 4 MiB of text."""

    tokens: np.ndarray
    answers: np.ndarray | None
    documents: int
    bytes: int


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids in files: little-endian uint16, or uint32 if the vocabulary has more than 65,536 entries."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encoded(documents: Iterator[Any], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The stream of at least one document, in pieces. Documents are texts or conversations, not both."""
    dtype = token_type(tokenizer)
    end, unlearned = np.array([tokenizer.separator_id], dtype), np.zeros(1, bool)
    tokens, answers = [end], [unlearned]
    for batch, size in _batches(documents):
        chats = not isinstance(batch[0], str)
        if chats:
            for chat in encode_chats(tokenizer, batch):
                tokens += [chat.tokens.astype(dtype), end]
                answers += [chat.answers, unlearned]
        else:
            tokens += chain.from_iterable((np.asarray(ids, dtype), end) for ids in tokenizer.encode_batch(batch))
        yield Encoded(np.concatenate(tokens), np.concatenate(answers) if chats else None, len(batch), size)
        tokens, answers = [], []


def _batches(documents: Iterator[Any]) -> Iterator[tuple[list[Any], int]]:
    """(documents, UTF-8 bytes of their texts), about 4 MiB at a time."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        texts = [document] if isinstance(document, str) else [message.content for message in document]
        size += sum(len(text.encode()) for text in texts)
        if size >= _BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def token_stream(documents: Iterator[Any], tokenizer: Tokenizer) -> Stream:
    """The stream of texts or conversations in memory, for what is scored once and not stored."""
    parts = list(encoded(documents, tokenizer))
    answers = [part.answers for part in parts if part.answers is not None]
    return Stream(np.concatenate([part.tokens for part in parts]), np.concatenate(answers) if answers else None)


def stored_documents(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a stream, in order."""
    before = None
    for first in range(0, len(tokens), _READ_TOKENS):
        ends = first + np.flatnonzero(tokens[first : first + _READ_TOKENS] == tokenizer.separator_id)
        for end in ends.tolist():
            if before is not None:
                yield tokenizer.decode(tokens[before + 1 : end].tolist())
            before = end


def opening_words(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Up to four words of the first line of the first document in a stream. A sample that begins so looks like the text
    of the model; a fixed prompt, such as "Once upon a time", suits one corpus only."""
    document = np.asarray(tokens[1 : 1 + _OPENING_TOKENS])  # a byte tokenizer needs up to four for a character
    ends = np.flatnonzero(document == tokenizer.separator_id)
    if len(ends):
        document = document[: ends[0]]
    text = tokenizer.decode(document.tolist()).lstrip().rstrip("\ufffd")  # the last character may be incomplete
    words = _FIRST_WORDS.match(text.partition("\n")[0])
    return words[0][:_OPENING_CHARACTERS] if words else ""


def openings(tokenizer: Tokenizer, tokens: np.ndarray, most: int) -> list[str]:
    """The opening words of the first documents of a stream, each once, at most `most` of them."""
    head = np.asarray(tokens[: _SEARCHED + _OPENING_TOKENS])
    starts = np.flatnonzero(head[:_SEARCHED] == tokenizer.separator_id)[:_DOCUMENTS]
    different = dict.fromkeys(opening_words(tokenizer, head[start:]) for start in starts)
    return [words for words in different if words][:most]
