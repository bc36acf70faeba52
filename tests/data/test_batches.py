"""Batches as pure functions of (seed, step). Streams are `arange`: a token says where it came from."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_jax.config import UserError
from moe_jax.data import batches
from moe_jax.data.batches import (
    TABLE_WINDOWS,
    evaluation_windows,
    permuted,
    text_bytes,
    train_positions,
    validation_subset,
    visited,
)
from tests.support.splitmix import scattered


def train_batch(stream: np.ndarray, **where: int) -> np.ndarray:
    """The tokens of a batch."""
    return stream[train_positions(len(stream), **where)].astype(np.int32)


sizes = st.integers(2, 400)
lengths = st.integers(2, 33)
seeds = st.integers(0, 2**31 - 1)


def rows_of_epochs(stream: np.ndarray, epochs: int, *, seed: int, batch_size: int, seq_len: int) -> np.ndarray:
    """The rows [epochs * W, T + 1] of the first epochs, out of as many steps as it takes."""
    wanted = epochs * ((len(stream) - 1) // seq_len)
    steps = math.ceil(wanted / batch_size)
    drawn = [train_batch(stream, seed=seed, step=step, batch_size=batch_size, seq_len=seq_len) for step in range(steps)]
    return np.concatenate(drawn)[:wanted]


@settings(deadline=None)
@given(tokens=sizes, seq_len=lengths, seed=seeds, batch_size=st.integers(1, 50))
def test_each_epoch_visits_each_window_once(tokens, seq_len, seed, batch_size):
    assume(tokens > seq_len)
    stream = np.arange(tokens, dtype=np.uint16)
    ring, windows = tokens - 1, (tokens - 1) // seq_len
    rows = rows_of_epochs(stream, 3, seed=seed, batch_size=batch_size, seq_len=seq_len)
    for row in rows:
        assert [(row[0] + i) % ring for i in range(seq_len + 1)] == list(row)
    for epoch in range(3):
        inputs = rows[epoch * windows : (epoch + 1) * windows, :-1]
        assert len(np.unique(inputs)) == windows * seq_len


def test_the_separator_that_ends_the_stream_is_the_one_that_begins_it():
    """5 tokens, windows of 4: the ring has 4 positions, and each window is all of it, once round."""
    stream = np.array([9, 1, 2, 3, 9], dtype=np.uint16)
    rounds = {(9, 1, 2, 3, 9), (1, 2, 3, 9, 1), (2, 3, 9, 1, 2), (3, 9, 1, 2, 3)}
    drawn = {tuple(train_batch(stream, seed=0, step=step, batch_size=1, seq_len=4)[0].tolist()) for step in range(60)}
    assert drawn == rounds


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 0), (2**31 - 1, 12)])
def test_the_windows_of_an_epoch_never_change(seed: int, epoch: int) -> None:
    """A run that an earlier version began gets the batches that it would have had there."""
    windows, ring = 100, 1003
    key = scattered(seed) + epoch
    base = scattered((key + 2**63) % 2**64)
    offset, order_key = batches._epoch(seed, epoch, ring)
    assert offset == scattered(key) % ring
    order = visited(order_key, np.arange(windows), windows)
    assert order.tolist() == sorted(range(windows), key=lambda window: scattered((base + window) % 2**64))


@settings(deadline=None)
@given(step=st.integers(0, 10**12), seed=seeds)
def test_a_batch_depends_on_seed_and_step_alone(step, seed):
    """Whatever was asked before. And a batch of 8 is two of 4, so an accumulated step is the whole one."""
    stream = np.arange(500, dtype=np.uint16)
    whole = train_batch(stream, seed=seed, step=step, batch_size=8, seq_len=7)
    halves = [train_batch(stream, seed=seed, step=2 * step + i, batch_size=4, seq_len=7) for i in (1, 0)]
    batches._table.cache_clear()
    np.testing.assert_array_equal(whole, np.concatenate(halves[::-1]))
    np.testing.assert_array_equal(whole, train_batch(stream, seed=seed, step=step, batch_size=8, seq_len=7))
    assert whole.dtype == np.int32


@settings(deadline=None)
@given(tokens=sizes, seq_len=lengths, batch_size=st.integers(1, 7))
def test_evaluation_predicts_every_token_after_the_first_once(tokens, seq_len, batch_size):
    """Checked against what the words say: who is predicted, from which input, and with how much context."""
    scored = math.ceil(seq_len / 2)
    counted, last_input, rows = [], -1, 0
    for batch in evaluation_windows(np.arange(tokens), seq_len=seq_len, batch_size=batch_size):
        assert batch.inputs.shape == (batch_size, seq_len)
        assert batch.inputs.dtype == batch.targets.dtype == batch.start.dtype == np.int32
        assert batch.targets.shape == batch.weights.shape == (batch_size, scored)
        for inputs, targets, start, weights in zip(
            batch.inputs, batch.targets, batch.start, batch.weights, strict=True
        ):
            assert 0 <= start <= seq_len - scored
            rows += weights.any()
            for i in np.flatnonzero(weights):
                position = start + i
                assert weights[i] == 1
                assert targets[i] == inputs[position] + 1
                context = inputs[: position + 1]
                np.testing.assert_array_equal(context, np.arange(context[0], targets[i]))
                assert len(context) >= min(targets[i], scored)
                counted.append(int(targets[i]))
                last_input = max(last_input, inputs[seq_len - 1])
    assert counted == list(range(1, tokens))
    if tokens > seq_len:
        assert last_input == tokens - 2  # the last window ends at the end of the stream
        assert rows == 2 + math.ceil((tokens - 1 - seq_len) / (seq_len // 2))


def test_evaluation_worked_case():
    """8 tokens, T = 4, S = 2: window 0 twice for targets 1 to 4, window 2 for 5 and 6, and the last one,
    which ends at the end, for 7 alone. Two rows a batch."""
    first, second = evaluation_windows(np.arange(10, 18), seq_len=4, batch_size=2)
    assert first.inputs.tolist() == [[10, 11, 12, 13], [10, 11, 12, 13]]
    assert first.start.tolist() == [0, 2]
    assert first.targets.tolist() == [[11, 12], [13, 14]]
    assert first.weights.tolist() == [[1, 1], [1, 1]]
    assert second.inputs.tolist() == [[12, 13, 14, 15], [13, 14, 15, 16]]
    assert second.start.tolist() == [2, 2]
    assert second.targets.tolist() == [[15, 16], [16, 17]]
    assert second.weights.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (9, [0, 5, 0, 6, 6, 0]),  # all of it
        (6, [0, 5, 0, 6, 6, 0]),
        (5, [0, 5, 0]),  # the second story does not fit
        (3, [0, 5, 0]),
        (2, [0, 5]),  # nor does the first: its beginning
    ],
)
def test_validation_subset_ends_with_a_document(limit, expected):
    stream = np.array([0, 5, 0, 6, 6, 0], dtype=np.uint16)
    assert validation_subset(stream, 0, limit).tolist() == expected


def test_text_bytes(monkeypatch):
    """Entries of 1, 3 and 0 bytes: 7 bytes in 5 tokens, more together than uint16 holds; in any chunks."""
    token_bytes = np.array([1, 3, 0], dtype=np.int32)
    tokens = np.array([2, 0, 1, 1, 2] * 30_000, dtype=np.uint16)
    assert text_bytes(tokens, token_bytes) == 7 * 30_000
    monkeypatch.setattr(batches, "_COUNT_CHUNK", 70_001)
    assert text_bytes(tokens, token_bytes) == 7 * 30_000
    with pytest.raises(UserError, match="token id 3 is outside the vocabulary of 3"):
        text_bytes(np.array([0, 3], dtype=np.uint16), token_bytes)


# The order of windows: each comes once, nothing of the order is seen, and it never changes

HUGE = 1_000_000_007
"""Windows of a stream of 256 billion tokens: a table of them would take 8 GB."""


def key(number: int) -> np.ndarray:
    return np.array([number], np.uint64)


@settings(deadline=None)
@given(size=st.integers(1, 3000), number=st.integers(0, 2**64 - 1))
def test_each_index_is_sent_to_a_place_of_its_own(size: int, number: int) -> None:
    assert sorted(permuted(key(number), np.arange(size), size)) == list(range(size))


@pytest.mark.parametrize("orders", [batches._table, lambda k, n: permuted(key(k), np.arange(n), n)])
def test_an_order_is_a_shuffle(orders) -> None:
    """In a random order an element moves by a third of the length on average, and neighbours part as far."""
    order = orders(5, 10_000)
    assert sorted(order) == list(range(10_000))
    assert np.abs(order - np.arange(10_000)).mean() / 10_000 == pytest.approx(1 / 3, abs=0.01)
    assert np.abs(np.diff(order)).mean() / 10_000 == pytest.approx(1 / 3, abs=0.01)


def by_hand(number: int, index: int, size: int) -> int:
    """The network and its walk in Python's integers."""
    half = ((size - 1).bit_length() + 1) // 2
    while True:
        left, right = index >> half, index % 2**half
        for n in range(6):
            left, right = right, left ^ (scattered(scattered((number + n) % 2**64) ^ right) % 2**half)
        index = left * 2**half + right
        if index < size:
            return index


def test_a_long_stream_has_an_order_that_never_changes_and_needs_no_table() -> None:
    """A run that an earlier version began gets the batches that it would have had there."""
    turns = np.array([0, 1, 2, 999, HUGE - 1])
    expected = [by_hand(2**64 - 2, int(turn), HUGE) for turn in turns]
    assert visited(key(2**64 - 2), turns, HUGE).tolist() == expected
    assert len(set(expected)) == 5
    assert max(expected) - min(expected) > HUGE / 10


def test_a_short_stream_keeps_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound itself is part of what never changes."""
    assert TABLE_WINDOWS == 16_777_216
    monkeypatch.setattr(batches, "TABLE_WINDOWS", 100)
    order = sorted(range(100), key=lambda window: scattered((9 + window) % 2**64))
    assert visited(key(9), np.array([0, 57, 99]), 100).tolist() == [order[0], order[57], order[99]]
    assert visited(key(9), np.array([0, 57, 99]), 101).tolist() == [by_hand(9, n, 101) for n in (0, 57, 99)]
