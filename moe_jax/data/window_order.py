"""The order in which an epoch visits its windows: a permutation of 0 .. n - 1, drawn from a key.

Up to `TABLE_WINDOWS` windows, the order is a table: the windows sorted by a hash of their number. A table takes 8 bytes
a window, and a sort. For 1e9 windows that would be 8 GB and about half an hour in every process. So more windows have
no table, and the permutation is computed for the asked indices only (`permuted`).

numpy's random generators are not used, because they may change with its version.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Int, UInt64

TABLE_WINDOWS = 1 << 24
"""Most windows of an epoch that have a table, of 128 MiB. Do not change this number: a resumed run with a number of
windows between the old and the new bound would read other batches."""
_ROUNDS = 6
"""Rounds of the Feistel network. Four make it a strong pseudorandom permutation where the round function is a
pseudorandom function (Luby and Rackoff 1988, theorem 1; Naor and Reingold 1999). `mix` is only a good hash, so two
more."""


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
    found = index.astype(np.uint64)
    outside = np.ones(len(index), bool)
    while outside.any():
        found[outside] = _feistel(key, found[outside], half)
        outside = found >= np.uint64(size)
    return found.astype(np.int64)


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
