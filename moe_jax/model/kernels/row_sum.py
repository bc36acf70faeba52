"""Products of a few rows with a matrix, as sums of the matrix's rows: a form for CPUs that reads the matrix in place.

x @ w is the sum of x[i] * w[i] over the rows of w. A loop adds these rows to a total, which stays in the cache. It
reads w once, and converts narrow weights or codes of 8 or 4 bits in registers. XLA compiles the loop to vector
instructions. Its own products are slower for a single row: they first copy the matrix that an index chooses, or write a
converted matrix to memory.

A turn of the loop adds several rows, because each turn reads and writes the total. The rows of a turn come from distant
parts of the matrix. Rows that follow one another were slower: if their length is a power of two, they take the same
places of the cache. `benchmarks/trials.md` has the other forms (111 to 120).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS = 4
"""Rows that a turn adds, if they are short."""
WIDE = 16384
"""Length from which a row is long."""
WIDE_ROWS, WIDE_CHAINS = 16, 4
"""Rows that a turn adds if they are long, and partial sums that they go into. Such a turn reads so much that XLA
spreads it over the cores. It runs a loop of smaller turns on one core."""


def row_sum(
    term: Callable[[Int[Array, ""]], Float[Array, "*N F"]], rows: int, total: Float[Array, "*N F"]
) -> Float[Array, "*N F"]:
    """total + the sum of term(i) for i from 0 to rows - 1. Not for training: the gradient would keep every total."""
    most, chains = (ROWS, 1) if total.shape[-1] <= WIDE else (WIDE_ROWS, WIDE_CHAINS)
    at_once = math.gcd(rows, most)
    turns = rows // at_once

    def turn(i: Int[Array, ""], total: Array) -> Array:
        terms = [term(part * turns + i) for part in range(at_once)]
        # One chain of 16 additions would wait for the result of each addition before the next.
        partial_sums = [sum(terms[n + chains :: chains], start=first) for n, first in enumerate(terms[:chains])]
        return sum(partial_sums, start=total)

    return jax.lax.fori_loop(0, turns, turn, total)


def row_at(matrix: Array, *index: Int[Array, ""]) -> Array:
    """matrix[*index], for indices that are in range."""
    outputs = matrix.shape[len(index) :]
    start = [jnp.asarray(i, jnp.int32) for i in (*index, *[0] * len(outputs))]  # of one type with x64, too
    return jax.lax.dynamic_slice(matrix, start, (1,) * len(index) + outputs).reshape(outputs)
