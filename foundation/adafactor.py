"""Adafactor: Adam's second moment v, [R, C], in R + C numbers. Derived in chapter 10.

Of all products w = r c^T the nearest to v in the divergence

    D(v, w) = sum_ij  v_ij log(v_ij / w_ij) - v_ij + w_ij

is w_ij = (row sum i) (column sum j) / (sum of all). Sums are linear in v, so the factors of the running mean are the
running means of the factors.

Source: Shazeer and Stern 2018, section 3 (the divergence and its minimum) and algorithms 4 and 5; section 6 (clipping),
section 7.2 (the decay 1 - t^-0.8).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

DECAY = 0.8
TINY = 1e-30
LARGEST_STEP = 1.0

Matrix = Float[Array, "R C"]


def divergence_forward(
    row: Float[Array, " R"], column: Float[Array, " C"], square: Matrix
) -> tuple[Float[Array, ""], tuple]:
    """D(square, row column^T), for positive entries."""
    fit = row[:, None] * column
    return jnp.sum(square * jnp.log(square / fit) - square + fit), (row, column, square)


def divergence_backward(d_out: Float[Array, ""], cache: tuple) -> tuple[Float[Array, " R"], Float[Array, " C"]]:
    """(d_row, d_column)."""
    row, column, square = cache
    d_row = jnp.sum(column) - jnp.sum(square, axis=1) / row
    d_column = jnp.sum(row) - jnp.sum(square, axis=0) / column
    return d_out * d_row, d_out * d_column


def rank_one_fit(square: Matrix) -> Matrix:
    """The matrix row column^T that is nearest to `square` in divergence."""
    return jnp.sum(square, axis=1, keepdims=True) * jnp.sum(square, axis=0, keepdims=True) / jnp.sum(square)


def adafactor_init(matrix: Matrix) -> tuple:
    """(step, row, column): steps taken, and the running means of the squared gradient's row means and column means."""
    return jnp.zeros((), int), jnp.zeros_like(matrix[:, 0]), jnp.zeros_like(matrix[0])


def adafactor_update(grad: Matrix, state: tuple, matrix: Matrix, lr: float) -> tuple[Matrix, tuple]:
    """w <- w - lr u / max(1, rms(u)), with u = g / sqrt(r c^T / mean(r)).

    There is no first moment, so a gradient that is suddenly large makes a large u: the root mean square of a step is
    clipped at 1. The first decay is 1 - 1^-0.8 = 0, so there is no start to correct for.
    """
    step, row, column = state
    step = step + 1
    keep = 1.0 - jnp.asarray(step, grad.dtype) ** -DECAY
    square = grad**2 + TINY
    row = keep * row + (1.0 - keep) * jnp.mean(square, axis=1)
    column = keep * column + (1.0 - keep) * jnp.mean(square, axis=0)
    direction = grad / jnp.sqrt(row[:, None] * column / jnp.mean(row))
    size = jnp.sqrt(jnp.mean(direction**2))
    return matrix - lr * direction / jnp.maximum(1.0, size / LARGEST_STEP), (step, row, column)
