"""What the model is given at a step: pure functions of a token array, with no iterator and no state.

Training. The stream begins and ends with a separator, so it closes to a ring of P = N - 1 positions. An epoch
cuts the ring into P // T windows of T tokens from an offset of its own, and visits each once in an order of
its own; the fewer than T tokens left over are others each time. Offset and order are hashes of (seed, epoch),
so a batch is a function of (seed, step) alone: a run that resumes at step n sees what an uninterrupted one
sees.

Evaluation. Every token after the first is predicted exactly once. Windows of T tokens advance by T // 2, and
each counts only what the ones before it did not: so a token has at least T / 2 tokens of context, or all
there are. A row scores S = ceil(T / 2) positions, since the vocabulary head is most of the cost; the first
window, of which all T count, therefore stands in two rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moe_jax.config import UserError

_COUNT_CHUNK = 1 << 22


def windows_per_epoch(tokens: int, seq_len: int) -> int:
    """Windows of `seq_len` targets in a stream of `tokens`. Raises ValueError where there is none."""
    windows = (tokens - 1) // seq_len
    if windows < 1:
        raise ValueError(f"a stream of {tokens} tokens has no window of {seq_len} + 1")
    return windows


def epoch_of(step: int, *, tokens: int, batch_size: int, seq_len: int) -> float:
    """Epochs gone by before `step`: 1.5 is halfway through the second."""
    return step * batch_size / windows_per_epoch(tokens, seq_len)


def train_batch(tokens: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """int32 [B, T + 1]: row b's inputs are its first T tokens, its targets the last T.

    Steps count from 0 and run on across epochs. A caller that accumulates gradients asks for the whole batch
    and reshapes it. Raises ValueError where `tokens` [N] has fewer than T + 1.
    """
    windows = windows_per_epoch(len(tokens), seq_len)
    ring = len(tokens) - 1
    starts = np.empty(batch_size, dtype=np.int64)
    for row in range(batch_size):
        epoch, turn = divmod(step * batch_size + row, windows)
        offset, order = _epoch(seed, epoch, windows, ring)
        starts[row] = offset + int(order[turn]) * seq_len
    positions = (starts[:, None] + np.arange(seq_len + 1)) % ring
    return tokens[positions].astype(np.int32)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, ring: int) -> tuple[int, np.ndarray]:
    """Where an epoch begins to cut, and the order [windows] in which it visits. Nothing here depends on the
    random generators of a numpy version: the order sorts a hash of the window's number that has no
    collisions."""
    key = _mix(np.array([seed], np.uint64)) + np.uint64(epoch)
    offset = int(_mix(key)[0] % np.uint64(ring))
    order = np.argsort(_mix(_mix(key + np.uint64(1 << 63)) + np.arange(windows, dtype=np.uint64)))
    return offset, order


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014): a bijection of uint64 that scatters
    neighbours."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class EvaluationBatch:
    """B rows, of which each scores S = ceil(T / 2) positions in a row."""

    inputs: np.ndarray
    """int32 [B, T]; a stream shorter than T is filled up with 0 on the right, which causality makes harmless.
    """
    targets: np.ndarray
    """int32 [B, S]: targets[b, i] is the token after position start[b] + i, 0 past the end of the stream."""
    start: np.ndarray
    """int32 [B]: the first scored position, at most T - S."""
    weights: np.ndarray
    """float32 [B, S]: 1 where the target counts, else 0. Rows that only fill up the last batch are 0
    throughout."""


def evaluation_windows(tokens: np.ndarray, *, seq_len: int, batch_size: int) -> Iterator[EvaluationBatch]:
    """Batches that predict each of tokens[1:] exactly once. All have the same shapes, so one compilation
    serves."""
    scored = math.ceil(seq_len / 2)
    rows = list(_evaluation_rows(len(tokens) - 1, seq_len, scored))
    for first in range(0, len(rows), batch_size):
        inputs = np.zeros((batch_size, seq_len), np.int32)
        targets = np.zeros((batch_size, scored), np.int32)
        start = np.zeros(batch_size, np.int32)
        weights = np.zeros((batch_size, scored), np.float32)
        for b, row in enumerate(rows[first : first + batch_size]):
            begin = row.window + row.start
            text = tokens[row.window : min(row.window + seq_len, len(tokens) - 1)]
            following = tokens[begin + 1 : begin + 1 + scored]
            inputs[b, : len(text)] = text
            targets[b, : len(following)] = following
            start[b] = row.start
            weights[b, row.counted[0] - begin : row.counted[1] - begin] = 1
        yield EvaluationBatch(inputs, targets, start, weights)


@dataclass(frozen=True)
class _Row:
    window: int  # stream position of the first input
    start: int  # first scored position, within the window
    counted: tuple[int, int]  # stream positions [from, to) whose next token counts


def _evaluation_rows(positions: int, seq_len: int, scored: int) -> Iterator[_Row]:
    """The rows for a stream in which `positions` tokens have a next one."""
    if seq_len < 2:
        raise ValueError(f"windows of {seq_len} tokens cannot overlap by half")
    last = max(0, positions - seq_len)  # the window that ends at the end of the stream
    window = done = 0
    while done < positions:
        start = min(done - window, seq_len - scored)
        end = min(window + start + scored, positions)
        yield _Row(window, start, (done, end))
        done = end
        if done == window + seq_len:
            window = min(window + seq_len // 2, last)


def validation_subset(tokens: np.ndarray, separator_id: int, limit: int) -> np.ndarray:
    """The longest prefix of at most `limit` tokens that ends with a story; of a longer first story, its
    beginning."""
    head = tokens[:limit]
    if len(tokens) <= limit:
        return head
    ends = np.flatnonzero(head[1:] == separator_id) + 2
    return head[: ends[-1]] if len(ends) else head


def text_bytes(tokens: np.ndarray, token_bytes: np.ndarray) -> int:
    """UTF-8 bytes that the tokens stand for: the sum of token_bytes int [V] (`Tokenizer.token_bytes`), with
    separators 0. Raises UserError for a token outside the vocabulary."""
    total = 0
    for first in range(0, len(tokens), _COUNT_CHUNK):
        chunk = tokens[first : first + _COUNT_CHUNK]
        if chunk.max() >= len(token_bytes):
            size = len(token_bytes)
            raise UserError(f"token id {chunk.max()} is outside the vocabulary of {size}; prepare the data again")
        total += int(token_bytes[chunk].sum(dtype=np.int64))
    return total
