"""The expensive operations, one function each. Differences between CPU and GPU are hidden inside the function.

Here: how attention cuts a sequence into blocks of queries, and from which length on its weights are computed twice. It
needs no jax, so memory can be known before anything starts.
"""

import math

QUERY_BLOCK = 128
"""Queries of a block. A block computes no scores for keys after its last query, so blocks skip part of the upper
triangle of the score matrix: a quarter of all scores at T = 256, seven sixteenths at T = 1024."""
LONGEST_KEPT = 1024
"""Longest sequence whose attention weights are kept for the backward pass. They are T / 2 numbers for each token and
head. A longer sequence computes them once more."""
SPANS = 8
"""Into how many spans of queries a longer sequence is cut. The queries of a span see the keys up to the span's end, so
of the score matrix (SPANS + 1) / (2 SPANS) is computed: 9/16, where a half is needed. More spans compute less and take
longer to compile."""


def query_blocks(positions: int) -> list[tuple[int, int]]:
    """(first, end) of each block of queries. The keys of a block are [0, end)."""
    return [(first, min(first + QUERY_BLOCK, positions)) for first in range(0, positions, QUERY_BLOCK)]


def query_spans(positions: int) -> list[tuple[int, int]]:
    """(first, end) of each span of queries: whole blocks, but for the last one. The keys of a span are [0, end)."""
    size = QUERY_BLOCK * math.ceil(positions / (SPANS * QUERY_BLOCK))
    return [(first, min(first + size, positions)) for first in range(0, positions, size)]


def computed_scores(positions: int) -> int:
    """Entries of the score matrix that are computed for one sequence and head, forward. A span has whole blocks: the
    last one is filled up with rows of zeros."""
    if positions <= LONGEST_KEPT:
        return sum((end - first) * end for first, end in query_blocks(positions))
    return sum(QUERY_BLOCK * math.ceil((end - first) / QUERY_BLOCK) * end for first, end in query_spans(positions))


def kept_scores(positions: int) -> int:
    """Scores or weights of a sequence and head that are in memory at once in the backward pass, at least: all that are
    visible, or those of one block."""
    if positions <= LONGEST_KEPT:
        return positions * positions // 2
    return QUERY_BLOCK * positions
