"""Training batches and evaluation windows: pure functions of a token array, without iterator or state.

Training. The stream of N tokens begins and ends with a separator, so its ends are joined into a ring of P = N - 1
positions. An epoch cuts the ring into P // T windows of T tokens and visits each window once. The offset of the first
window and the order of the windows change with the epoch. P % T tokens are left out; they differ from epoch to epoch.
Offset and order are functions of (seed, epoch). So a batch is a function of the token stream, the seed and the step
alone. A run that is resumed at step n gets the same batches as an uninterrupted run. numpy's random generators are not
used, because they may change with its version.

Conversations. A batch has weights beside its tokens (`MaskedBatch`): only answers count. A batch is still a function of
the stream, the seed and the step.

Evaluation. Every token after the first is predicted exactly once. Windows of T tokens advance by T // 2 positions, and
a window counts only the tokens that no earlier window has counted. So a token has at least T / 2 tokens of context, or
all earlier tokens if there are fewer. A row scores only S = ceil(T / 2) positions, because the vocabulary head is most
of the cost. In the first window all T positions count, so the first window appears in two rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import batched, pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from moe_jax.config import UserError

_COUNT_CHUNK = 1 << 22
TABLE_WINDOWS = 1 << 24
"""Most windows of an epoch whose order is a table, of 128 MiB. A table of 1e9 windows would take 8 GB and half an hour
in every process, so with more windows the order is computed index by index (`permuted`). Do not change this number: a
resumed run with a number of windows between the old and the new bound would read other batches."""
_ROUNDS = 6
"""Rounds of the Feistel network. Four make it a strong pseudorandom permutation where the round function is a
pseudorandom function (Luby and Rackoff 1988, theorem 1; Naor and Reingold 1999). `mix` is only a good hash, so two
more."""


class MaskedBatch(NamedTuple):
    """A batch of which only some targets count."""

    tokens: np.ndarray
    """int32 [M, B, T + 1]: M micro-batches."""
    weights: np.ndarray
    """float32 [M, B, T], the weight of each target in the loss of its micro-batch. 0 where a target does not count. The
    others are M / (all targets of the step that count). So the mean of the M losses is the mean over these targets,
    however they are spread over the micro-batches (chapter 13 of `foundation`). All are 0 if no target counts."""

    @classmethod
    def of(cls, tokens: np.ndarray, counted: np.ndarray) -> "MaskedBatch":
        """The batch of tokens [M, B, T + 1], of whose targets those count that are true in `counted` [M, B, T]."""
        count = int(counted.sum())
        share = np.float32(len(tokens) / count if count else 0)
        return cls(tokens, counted.astype(np.float32) * share)


def train_positions(count: int, *, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """int64 [B, T + 1]: where in a stream of `count` tokens the tokens of a batch are. The first T of a row are its
    inputs, and the last T its targets.

    Steps count from 0, through all epochs. For gradient accumulation, a caller asks for all rows of the step at once
    and reshapes them. The stream has at least T + 1 tokens (`prepare_token_store` checks it).
    """
    ring = count - 1
    windows = ring // seq_len
    epochs, turns = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), windows)
    starts = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        offset, key = _epoch(seed, int(epoch), ring)
        rows = epochs == epoch
        starts[rows] = offset + visited(key, turns[rows], windows) * seq_len
    return (starts[:, None] + np.arange(seq_len + 1)) % ring


def _epoch(seed: int, epoch: int, ring: int) -> tuple[int, np.ndarray]:
    """The offset of an epoch's first window, and the key of the order of its windows, uint64 [1]."""
    key = mix(np.array([seed], np.uint64)) + np.uint64(epoch)
    return int(mix(key)[0] % np.uint64(ring)), mix(key + np.uint64(1 << 63))


def visited(key: UInt64[np.ndarray, " 1"], turns: Int[np.ndarray, " B"], windows: int) -> Int[np.ndarray, " B"]:
    """The windows that an epoch visits at these turns. Over the turns 0 .. windows - 1 each window comes once."""
    if windows <= TABLE_WINDOWS:
        return _table(int(key[0]), windows)[turns]
    return permuted(key, turns, windows)


@lru_cache(maxsize=4)
def _table(key: int, windows: int) -> Int[np.ndarray, " windows"]:
    """Windows sorted by a hash of their number, which has no collisions."""
    return np.argsort(mix(np.uint64(key) + np.arange(windows, dtype=np.uint64)))


def permuted(key: UInt64[np.ndarray, " 1"], index: Int[np.ndarray, " B"], size: int) -> Int[np.ndarray, " B"]:
    """Where a permutation of 0 .. size - 1 sends each index.

    A Feistel network permutes the numbers of 2 h bits, of which there are at least `size` and fewer than 4 `size`. A
    number that leaves the range goes through the network again, until it is back ("cycle walking": Black and Rogaway
    2002, section 3). An index needs fewer than 4 passes on average. Raises ValueError for an index out of range.
    """
    if len(index) and not 0 <= index.min() <= index.max() < size:
        raise ValueError(f"index {index.min()} to {index.max()}: must be in 0 .. {size - 1}")
    half = np.uint64(-(-(size - 1).bit_length() // 2) or 1)
    place = index.astype(np.uint64)
    outside = np.ones(len(index), bool)
    while outside.any():
        place[outside] = _feistel(key, place[outside], half)
        outside = place >= np.uint64(size)
    return place.astype(np.int64)


def _feistel(key: UInt64[np.ndarray, " 1"], x: UInt64[np.ndarray, " B"], half: np.uint64) -> UInt64[np.ndarray, " B"]:
    """(left, right) becomes (right, left xor hash(right)), in each round with another hash. Each round can be undone,
    whatever the hash is."""
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low
    for n in range(_ROUNDS):
        left, right = right, left ^ (mix(mix(key + np.uint64(n)) ^ right) & low)
    return (left << half) | right


def mix(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """SplitMix64's output function (Steele, Lea and Flood 2014): a bijection of uint64 that scatters neighbours."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class EvaluationBatch:
    """B rows. Each row scores S = ceil(T / 2) consecutive positions."""

    inputs: np.ndarray
    """int32 [B, T]. A stream shorter than T is padded with 0 on the right. The model is causal, so the padding changes
    no earlier position."""
    targets: np.ndarray
    """int32 [B, S]: targets[b, i] is the token after position start[b] + i, 0 past the end of the stream."""
    start: np.ndarray
    """int32 [B]: the first scored position, at most T - S."""
    weights: np.ndarray
    """float32 [B, S]: 1 where the target counts, else 0. All 0 in rows that only fill up the last batch."""


def evaluation_windows(
    tokens: np.ndarray, *, seq_len: int, batch_size: int, answers: np.ndarray | None = None
) -> Iterator[EvaluationBatch]:
    """Batches that predict each of tokens[1:] exactly once. All have the same shapes, so one program serves all.

    With `answers`, bool [N], only the tokens that are true there count. Rows in which none counts are left out.
    """
    positions, scored = len(tokens) - 1, math.ceil(seq_len / 2)
    # Where rows end: half of the first window, its other half, and then half a window further each.
    ends = sorted({0, min(scored, positions), *range(seq_len, positions, seq_len // 2), positions})
    rows = list(pairwise(ends))
    if answers is not None:
        rows = [(first, last) for first, last in rows if answers[first + 1 : last + 1].any()]
    for batch in batched(rows, batch_size):
        inputs = np.zeros((batch_size, seq_len), np.int32)
        targets = np.zeros((batch_size, scored), np.int32)
        start = np.zeros(batch_size, np.int32)
        weights = np.zeros((batch_size, scored), np.float32)
        for b, (first, last) in enumerate(batch):
            window = max(0, last - seq_len)
            start[b] = seq_len - scored if first else 0
            begin = window + int(start[b])
            text = tokens[window : min(window + seq_len, positions)]
            following = tokens[begin + 1 : begin + 1 + scored]
            inputs[b, : len(text)] = text
            targets[b, : len(following)] = following
            weights[b, first - begin : last - begin] = 1 if answers is None else answers[first + 1 : last + 1]
        yield EvaluationBatch(inputs, targets, start, weights)


def validation_subset(tokens: np.ndarray, separator_id: int, limit: int) -> np.ndarray:
    """The longest prefix of at most `limit` tokens that ends at the end of a document. If the first document is longer,
    its first `limit` tokens."""
    head = tokens[:limit]
    if len(tokens) <= limit:
        return head
    ends = np.flatnonzero(head[1:] == separator_id) + 2
    return head[: ends[-1]] if len(ends) else head


def text_bytes(tokens: np.ndarray, token_bytes: np.ndarray, answers: np.ndarray | None = None) -> int:
    """UTF-8 bytes of the text of the tokens: the sum of their entries in token_bytes int [V] (`Tokenizer.token_bytes`).
    A separator counts 0 bytes. With `answers`, bool [N], only the tokens that are true there count.

    Raises UserError for a token outside the vocabulary.
    """
    total = 0
    for first in range(0, len(tokens), _COUNT_CHUNK):
        chunk = tokens[first : first + _COUNT_CHUNK]
        if answers is not None:
            chunk = chunk[answers[first : first + _COUNT_CHUNK]]
        if len(chunk) and chunk.max() >= len(token_bytes):
            size = len(token_bytes)
            raise UserError(f"token id {chunk.max()} is outside the vocabulary of {size}; prepare the data again")
        total += int(token_bytes[chunk].sum(dtype=np.int64))
    return total
