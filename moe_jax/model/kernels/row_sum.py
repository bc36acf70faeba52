"""Products of a few rows with a matrix, as sums of the matrix's rows: a form for CPUs that reads the matrix in place.

x @ w is the sum of x[i] * w[i] over the rows of w. A loop adds these rows to a total, which stays in the cache. It
reads w once, and converts narrow weights or codes of 8 or 4 bits in registers. XLA compiles the loop to vector
instructions. Its own products are slower for a single row: they first copy the matrix that an index chooses, or write a
converted matrix to memory.

XLA runs the loop on one core. A turn adds several rows, because each turn reads and writes the total. These rows come
from distant parts of the matrix. Rows that follow one another were slower: if their length is a power of two, they take
the same places of the cache.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS = 4
"""Rows that a turn adds."""


def row_sum(
    term: Callable[[Int[Array, ""]], Float[Array, "*N F"]], rows: int, total: Float[Array, "*N F"]
) -> Float[Array, "*N F"]:
    """total + the sum of term(i) for i from 0 to rows - 1. Not for training: the gradient would keep every total."""
    at_once = math.gcd(rows, ROWS)
    turns = rows // at_once

    def turn(i: Int[Array, ""], total: Array) -> Array:
        return sum((term(part * turns + i) for part in range(at_once)), start=total)

    return jax.lax.fori_loop(0, turns, turn, total)


def row_at(matrix: Array, *index: Int[Array, ""]) -> Array:
    """matrix[*index], for indices that are in range."""
    return part_at(matrix, *index, sizes=matrix.shape[len(index) :])


def part_at(matrix: Array, *start: Int[Array, ""], sizes: tuple[int, ...]) -> Array:
    """The part of these sizes of matrix[*index], where the index is all of `start` that is not a start of the part. The
    starts that are left out are 0. All must be in range."""
    index = matrix.ndim - len(sizes)
    starts = [jnp.asarray(i, jnp.int32) for i in (*start, *[0] * (matrix.ndim - len(start)))]  # of one type with x64
    return jax.lax.dynamic_slice(matrix, starts, (1,) * index + sizes).reshape(sizes)
