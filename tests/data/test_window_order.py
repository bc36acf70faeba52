"""The order of windows: each comes once, nothing of the order is seen, and it never changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import window_order
from moe_jax.data.window_order import TABLE_WINDOWS, mix, permuted, visited
from tests.support.splitmix import scattered

HUGE = 1_000_000_007
"""Windows of a stream of 256 billion tokens: a table of them would take 8 GB."""


def key(number: int) -> np.ndarray:
    return np.array([number], np.uint64)


def test_mix_is_splitmix64() -> None:
    """The first outputs of the published generator, seeded with 0."""
    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(x) for x in mix(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@settings(deadline=None)
@given(size=st.integers(1, 3000), number=st.integers(0, 2**64 - 1))
def test_each_index_is_sent_to_a_place_of_its_own(size: int, number: int) -> None:
    assert sorted(permuted(key(number), np.arange(size), size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257])
def test_sizes_around_powers_of_two(size: int) -> None:
    assert sorted(permuted(key(3), np.arange(size), size)) == list(range(size))


@pytest.mark.parametrize("orders", [window_order._table, lambda k, n: permuted(key(k), np.arange(n), n)])
def test_an_order_is_a_shuffle(orders) -> None:
    """In a random order an element moves by a third of the length on average, and neighbours part as far."""
    order = orders(5, 10_000)
    assert sorted(order) == list(range(10_000))
    assert np.abs(order - np.arange(10_000)).mean() / 10_000 == pytest.approx(1 / 3, abs=0.01)
    assert np.abs(np.diff(order)).mean() / 10_000 == pytest.approx(1 / 3, abs=0.01)


def test_every_place_is_as_likely_for_an_index() -> None:
    """Index 2 of 5 under 5,000 keys: a chi-squared statistic of four degrees of freedom, below its 0.999 quantile."""
    counts = np.bincount([permuted(key(k), np.array([2]), 5)[0] for k in range(5000)], minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < 18.5


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
    monkeypatch.setattr(window_order, "TABLE_WINDOWS", 100)
    order = sorted(range(100), key=lambda window: scattered((9 + window) % 2**64))
    assert visited(key(9), np.array([0, 57, 99]), 100).tolist() == [order[0], order[57], order[99]]
    assert visited(key(9), np.array([0, 57, 99]), 101).tolist() == [by_hand(9, n, 101) for n in (0, 57, 99)]


def test_an_index_out_of_range() -> None:
    """It would walk for ever, or to a place that another index has."""
    with pytest.raises(ValueError, match=r"index -1 to 3: must be in 0 \.\. 6"):
        permuted(key(0), np.array([3, -1]), 7)
