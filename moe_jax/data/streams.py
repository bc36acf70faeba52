"""Documents as one stream of token ids: `separator, document, separator, ..., separator`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.chat_rows import text_size
from moe_jax.data.chats import encode_chats
from moe_jax.data.shards import TokenArray
from moe_jax.data.tokenizers import Tokenizer

_BATCH_BYTES = 1 << 20  # text encoded at a time
_READ_TOKENS = 1 << 20  # tokens looked at in a time


class Stream(NamedTuple):
    """Tokens that are scored."""

    tokens: TokenArray
    """uint16 or uint32 [N]."""
    answers: TokenArray | None = None
    """bool [N]: the tokens that count. None if all of them do."""


class Encoded(NamedTuple):
    """Some documents of a stream, about 1 MiB of text."""

    tokens: np.ndarray
    answers: np.ndarray | None
    documents: int
    bytes: int


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids in files: little-endian uint16, or uint32 if the vocabulary has more than 65,536 entries."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encoded(documents: Iterator[Any], tokenizer: Tokenizer, first: bool = True) -> Iterator[Encoded]:
    """The stream of the documents in pieces. `first` is false for documents that continue a stream: the separator
    before them is already there. Without documents, only that first separator is given out. Documents are texts or
    conversations, not both."""
    dtype = token_type(tokenizer)
    end, unlearned = np.array([tokenizer.separator_id], dtype), np.zeros(1, bool)
    tokens, answers = ([end], [unlearned]) if first else ([end[:0]], [unlearned[:0]])
    for batch, size in _batches(documents):
        chats = not isinstance(batch[0], str)
        if chats:
            for chat in encode_chats(tokenizer, batch):
                tokens += [chat.tokens.astype(dtype), end]
                answers += [chat.answers, unlearned]
        else:
            tokens += [part for ids in tokenizer.encode_batch(batch) for part in (np.asarray(ids, dtype), end)]
        yield Encoded(np.concatenate(tokens), np.concatenate(answers) if chats else None, len(batch), size)
        tokens, answers = [end[:0]], [unlearned[:0]]
    if len(tokens[0]):
        yield Encoded(tokens[0], None, 0, 0)


def _batches(documents: Iterator[Any]) -> Iterator[tuple[list[Any], int]]:
    """(documents, their bytes), about 1 MiB at a time."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.encode()) if isinstance(document, str) else text_size(document)
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


def stored_documents(tokens: TokenArray, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a stream, in order."""
    before = None
    for first in range(0, len(tokens), _READ_TOKENS):
        ends = first + np.flatnonzero(tokens[first : first + _READ_TOKENS] == tokenizer.separator_id)
        for end in ends.tolist():
            if before is not None:
                yield tokenizer.decode(tokens[before + 1 : end].tolist())
            before = end
