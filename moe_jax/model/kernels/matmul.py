"""Matrix products in forms that are fast on a CPU: `matmul` with its gradients, and products of a single row.

On a CPU, XLA calls a library that sums along the last axis, in memory order, of the left operand. The gradient of the
weights of `x @ w` is x^T d_y, which sums over the first axis of x. In bfloat16 x^T is written to memory first, or the
library falls back to float32; in float32 that costs more than it saves (`benchmarks/performance.md`). On a GPU a
transposed operand costs nothing, so x^T is not written to memory.

A single row is multiplied where the matrix lies (`row_sum`): x @ w is the sum of x[i] * w[i] over the rows of w. A loop
adds these rows to a total, which stays in the cache. It reads w once, and converts narrow weights or codes in
registers. XLA's own products first copy the matrix that an index chooses, or write a converted matrix to memory. The
loop runs on one core. A turn adds several rows, because each turn reads and writes the total. They come from distant
parts of the matrix: rows that follow one another may take the same places of the cache. `benchmarks/trials.md` has the
other forms (111 to 122).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.processor import by_platform
from moe_jax.model.precision import at_least_float32, dot_precision

ROWS = 4
"""Rows that a turn of `row_sum` adds."""


def transpose_contiguous(x: Float[Array, "*G N D"]) -> Float[Array, "*G D N"]:
    """x with its last two axes swapped. On a CPU, an x narrower than float32 is written to memory in the new order."""

    def written(x: Array) -> Array:
        return with_layout_constraint(x.swapaxes(-1, -2), Layout(major_to_minor=tuple(range(x.ndim))))

    if x.dtype.itemsize >= 4:
        return x.swapaxes(-1, -2)
    return by_platform(x, cpu=written, default=lambda x: x.swapaxes(-1, -2))


def transposed_product(x: Float[Array, "*G N D"], y: Float[Array, "*G N F"]) -> Float[Array, "*G D F"]:
    """x^T y in at least float32, for operands of one dtype.

    With the barrier, XLA does not turn the transpose of the result, which a tied head needs, into a product that sums
    along other axes. On a CPU that one cannot run for operands narrower than float32: "Unsupported element type for
    DotThunk".
    """
    wide = at_least_float32(x.dtype)
    product = jnp.matmul(transpose_contiguous(x), y, precision=dot_precision(x.dtype), preferred_element_type=wide)
    if x.dtype == wide:
        return product
    return by_platform(product, cpu=jax.lax.optimization_barrier, default=lambda product: product)


@jax.custom_vjp
def matmul(x: Float[Array, "*G N D"], weights: Float[Array, "*G D F"]) -> Float[Array, "*G N F"]:
    """x @ weights for each group G, in the dtype of x. `weights` may be wider than x; their gradient has the dtype of
    `weights`.

    On a CPU, a single row is multiplied where the weights lie (`row_sum`). Writing a text is bound by reading them.

    On a CPU the gradient of the weights is computed in at least float32. On a GPU it is summed in float32 too, but
    rounded to the dtype of x and kept in it until the optimizer needs it.

        d_x = d_y weights^T        d_weights = x^T d_y
    """

    def product(x: Array, weights: Array) -> Array:
        return jnp.matmul(x, weights.astype(x.dtype), precision=dot_precision(x.dtype))

    def in_place(x: Array, weights: Array) -> Array:
        return vector_matmul(x[0], weights)[None]

    if x.shape[:-1] != (1,):
        return product(x, weights)
    return by_platform(x, weights, cpu=in_place, default=product)


def vector_matmul(x: Float[Array, " D"], weights: Float[Array, "*E D F"], *index: Int[Array, ""]) -> Float[Array, " F"]:
    """x @ weights[*index] in the dtype of x, summed in at least float32. On a CPU the weights are read in place. Not
    for training."""
    wide = at_least_float32(x.dtype)

    def term(i: Int[Array, ""]) -> Array:
        return x[i].astype(wide) * row_at(weights, *index, i).astype(x.dtype).astype(wide)

    return row_sum(term, len(x), jnp.zeros(weights.shape[-1], wide)).astype(x.dtype)


def _forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, weights), (x, weights)


def _backward(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weights = residuals
    precision = dot_precision(x.dtype)
    d_x = jnp.einsum("...nf,...df->...nd", d_y, weights.astype(x.dtype), precision=precision)

    def summed_wide(x: Array, d_y: Array) -> Array:
        return transposed_product(x, d_y).astype(weights.dtype)

    def summed_as_it_is(x: Array, d_y: Array) -> Array:
        return jnp.matmul(x.swapaxes(-1, -2), d_y, precision=precision).astype(weights.dtype)

    return d_x, by_platform(x, d_y, cpu=summed_wide, default=summed_as_it_is)


matmul.defvjp(_forward, _backward)


def matmul_wide(x: Float[Array, "*N D"], weights: Float[Array, "D F"]) -> Float[Array, "*N F"]:
    """x @ weights in at least float32, for operands of one dtype.

    The weights of a single row are cast while they are read. Otherwise a library would get a float32 copy of them,
    written at every token. On a GPU the product is one multiplication and one sum, into which XLA fuses the cast, and
    on a CPU a sum of rows.
    """
    wide = at_least_float32(x.dtype)

    def product(x: Array, weights: Array) -> Array:
        return jnp.matmul(x, weights, precision=dot_precision(x.dtype), preferred_element_type=wide)

    def in_place(x: Array, weights: Array) -> Array:
        return vector_matmul(x.reshape(-1).astype(wide), weights).reshape(*x.shape[:-1], -1)

    if x.size > x.shape[-1]:
        return product(x, weights)
    on_cpu = product if x.dtype == wide else in_place
    return by_platform(x, weights, cpu=on_cpu, default=_row_matmul)


def _row_matmul(x: Float[Array, "*N D"], weights: Float[Array, "D F"]) -> Float[Array, "*N F"]:
    wide = at_least_float32(x.dtype)
    return (x.astype(wide)[..., None] * weights.astype(wide)).sum(-2)


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
