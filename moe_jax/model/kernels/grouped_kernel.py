"""Grouped matrix products for a GPU that read each expert's matrix where it lies, without a copy for each group.

The programs are written in Pallas and compiled by Triton, for cards of compute capability 8.0 or more. XLA has no such
product for these cards: `jax.lax.ragged_dot` multiplies every row with every expert's matrix. The groups are those of
`grouped_matmul.py`, and the further groups are sorted by expert.

    multiply    one program for each group and each tile of columns. Programs that follow one another belong to one
                expert, so its matrix stays in the card's L2 cache.
    gradients   of the rows: the same with transposed matrices. Of the matrices: one program for each tile of each
                matrix. It adds the groups of the expert in order, so there are no atomic additions, and the result has
                the same bits each time.

A tile is at most 128 x 128, and a program reads 32 entries of the contracted axis at a time. Compiled for capability
8.6, a program takes 24 or 32 KiB of shared memory, and a thread at most 168 registers, none spilled. For capability
9.0 it takes up to 64 KiB. Cards of capability 8.6 have 99 KiB for a program, the least of all cards from 8.0 on. So
one choice of tiles serves all cards.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.model.precision import at_least_float32, dot_precision

LARGEST_TILE = 128
"""Most rows and columns of a tile. Its sums are 64 registers of each of 256 threads."""
DEPTH = 32
"""Most entries of the contracted axis that are read at a time."""
SMALLEST_TILE = 16
"""Triton multiplies no smaller tiles."""


def suits(rows: tuple[int, ...], weights: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether the programs can multiply operands of these shapes, `[G, R, D]` and `[E, D, F]`, with rows of this dtype.

    D and F must be multiples of 16, and R a power of 2 from 16 to 128. No array may have 2^31 numbers or more.
    """
    groups, count, width = rows
    hidden = weights[2]
    tiles = count == _tile(count) and min(_tile(count), _tile(width), _tile(hidden)) >= SMALLEST_TILE
    # Triton computes places in memory in 32 bits.
    small = max(groups * count * max(width, hidden), math.prod(weights)) < 2**31
    return tiles and small and jnp.finfo(dtype).bits <= 32


def _tile(size: int, most: int = LARGEST_TILE) -> int:
    """The largest power of 2 that divides a size, at most `most`."""
    return min(size & -size, most)


def multiply(
    rows: Float[Array, "G R D"],
    weights: Float[Array, "E D F"],
    further_expert: Int[Array, " further"],
    interpret: bool = False,
) -> Float[Array, "G R F"]:
    """rows[g] @ (the matrix of group g), summed in float32, in the dtype of the rows. `further_expert` is sorted.

    `interpret` runs the programs on a CPU, for tests.
    """
    return _times_matrices(rows, weights.astype(rows.dtype), further_expert, False, interpret)


def gradients(
    rows: Float[Array, "G R D"],
    weights: Float[Array, "E D F"],
    further_expert: Int[Array, " further"],
    d_y: Float[Array, "G R F"],
    interpret: bool = False,
) -> tuple[Float[Array, "G R D"], Float[Array, "E D F"]]:
    """The gradients of `multiply`, of the rows and of the matrices.

    The gradient of the matrices has their dtype, but it is rounded to the dtype of the rows, as the gradient of every
    matrix on a GPU is (`matmul.py`).

    d_x_g = d_y_g W_e^T        d_W_e = sum of x_g^T d_y_g over the groups g of e
    """
    d_rows = _times_matrices(d_y, weights.astype(rows.dtype), further_expert, True, interpret)
    d_weights = _sum_of_products(rows, d_y, further_expert, len(weights), interpret)
    return d_rows, d_weights.astype(weights.dtype)


def _further_ends(further_expert: Int[Array, " further"], experts: int) -> Int[Array, " P"]:
    """For each expert, how many further groups belong to it or to an earlier expert. P is the number of experts,
    rounded up to a power of 2, because Triton reads no other lengths."""
    up_to = jnp.arange(2 ** math.ceil(math.log2(experts)))
    return (further_expert[None] <= up_to[:, None]).sum(1, dtype=jnp.int32)


def _group_at(place: Int[Array, ""], ends: Int[Array, " P"], experts: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The group at a place of the order by expert, and its expert. An expert has its first group, then its further
    groups. Each program computes this for itself, so that no kernel must run before."""
    # The groups of expert e end before place e + 1 + ends[e].
    place_after = jax.lax.iota(jnp.int32, len(ends)) + 1 + ends
    expert = (place_after <= place).sum(dtype=jnp.int32)
    first = jnp.where(place_after <= place, place_after, 0).max()
    return jnp.where(place == first, expert, experts + place - expert - 1), expert


def _times_matrices(
    rows: Float[Array, "G R C"],
    matrices: Float[Array, "E _ _"],
    further_expert: Int[Array, " further"],
    transposed: bool,
    interpret: bool,
) -> Float[Array, "G R N"]:
    """rows[g] @ matrices[e], or rows[g] @ matrices[e]^T, for each group g of expert e."""
    groups, count, contracted = rows.shape
    columns = matrices.shape[1 if transposed else 2]
    experts, tile, depth = len(matrices), _tile(columns), _tile(contracted, DEPTH)

    def grouped_rows(ends: Any, rows: Any, matrices: Any, out: Any) -> None:
        from jax.experimental import pallas as pl

        g, e = _group_at(pl.program_id(1), ends[...], experts)
        own = pl.ds(pl.program_id(0) * tile, tile)

        def add(step: Array, total: Array) -> Array:
            some = pl.ds(step * depth, depth)
            matrix = matrices[e, own, some].T if transposed else matrices[e, some, own]
            return total + _dot(rows[g, :, some], matrix)

        start = jnp.zeros((count, tile), jnp.float32)
        out[g, :, own] = jax.lax.fori_loop(0, contracted // depth, add, start).astype(out.dtype)

    out = jax.ShapeDtypeStruct((groups, count, columns), rows.dtype)
    run = _program(grouped_rows, out, (columns // tile, groups), count * tile, rows.dtype, interpret)
    return run(_further_ends(further_expert, experts), rows, matrices)


def _sum_of_products(
    rows: Float[Array, "G R D"],
    d_y: Float[Array, "G R F"],
    further_expert: Int[Array, " further"],
    experts: int,
    interpret: bool,
) -> Float[Array, "E D F"]:
    """The sum of rows[g]^T @ d_y[g] over the groups g of each expert."""
    _, count, width = rows.shape
    hidden = d_y.shape[2]
    tiles, depth = (_tile(width), _tile(hidden)), _tile(count, DEPTH)
    reads = count // depth

    def grouped_weights(ends: Any, rows: Any, d_y: Any, out: Any) -> None:
        from jax.experimental import pallas as pl

        e = pl.program_id(2)
        left = pl.ds(pl.program_id(1) * tiles[0], tiles[0])
        right = pl.ds(pl.program_id(0) * tiles[1], tiles[1])
        first = jnp.where(e == 0, 0, ends[jnp.maximum(e - 1, 0)])

        def add(step: Array, total: Array) -> Array:
            nth, some = jax.lax.div(step, reads), pl.ds(jax.lax.rem(step, reads) * depth, depth)
            g = jnp.where(nth == 0, e, experts + first + nth - 1)
            return total + _dot(rows[g, some, left].T, d_y[g, some, right])

        steps = (1 + ends[e] - first) * reads
        out[e, left, right] = jax.lax.fori_loop(0, steps, add, jnp.zeros(tiles, jnp.float32)).astype(out.dtype)

    out = jax.ShapeDtypeStruct((experts, width, hidden), rows.dtype)
    grid = (hidden // tiles[1], width // tiles[0], experts)
    run = _program(grouped_weights, out, grid, tiles[0] * tiles[1], rows.dtype, interpret)
    return run(_further_ends(further_expert, experts), rows, d_y)


def _dot(left: Array, right: Array) -> Array:
    return jnp.dot(
        left, right, precision=dot_precision(left.dtype), preferred_element_type=at_least_float32(left.dtype)
    )


def _program(kernel: Any, out: Any, grid: tuple[int, ...], sums: int, dtype: jnp.dtype, interpret: bool) -> Any:
    """A call of a kernel in Pallas. The kernel takes whole arrays. Each of its programs makes `sums` numbers, from
    operands of `dtype`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    warps, reads = 8 if sums > LARGEST_TILE * 64 else 4, 3 if jnp.finfo(dtype).bits <= 16 else 2
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=reads),
        interpret=interpret,
        name=kernel.__name__,
    )
