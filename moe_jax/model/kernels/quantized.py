"""Products of quantised matrices (`model/quantized.py`) with activations.

Decoding is bound by reading weights, so a product of few rows must read each code once, and nothing else of that size.
XLA's own products on a CPU write the converted matrix to memory first. Here the codes are converted in registers: by
`row_sum` on one core, or by a sum of groups on all cores: codes of 4 bits, whose conversion takes longer than reading
them, and the many outputs of a vocabulary head.

While a core converts codes, it is too busy to ask for memory far ahead. It does so only where memory is read in order,
which it recognises. So codes of 4 bits are put in that order, in tiles, when a run is opened (`in_tiles`).

A product of many rows is bound by arithmetic. There the matrix is converted first, and one matrix is converted at a
time: the copy of one expert fits the cache.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.matmul import matmul, row_at, row_sum, vector_matmul
from moe_jax.model.kernels.processor import by_platform
from moe_jax.model.precision import at_least_float32, dot_precision
from moe_jax.model.quantized import OFFSET, TILE, QuantizedMatrix, group_size

FEW_ROWS = 4
"""Most rows of a product that reads the codes in place. With more, the matrix is converted first."""
BLOCK = 4096
"""Columns that are converted at once: a vocabulary head does not fit the cache."""
MANY = 16384
"""Outputs of a matrix from which a product of few rows is worth several cores."""
STREAMS = 4
"""Distant groups whose tiles are read in turn. So the core fetches ahead in as many places."""
_CHAINS = 8


def product(x: Float[Array, "*G N D"], weights: Float[Array, "*G D F"] | QuantizedMatrix) -> Float[Array, "*G N F"]:
    """x @ weights for each group G, in the dtype of x. Quantised weights have no gradient."""
    return quantized_matmul(x, weights) if isinstance(weights, QuantizedMatrix) else matmul(x, weights)


def vector_product(
    x: Float[Array, " D"], weights: Float[Array, "E D F"] | QuantizedMatrix, expert: Int[Array, ""]
) -> Float[Array, " F"]:
    """x @ weights[expert] in the dtype of x, summed in at least float32."""
    if isinstance(weights, QuantizedMatrix):
        return quantized_vectors_matmul(x[None], weights, expert[None])[0]
    return vector_matmul(x, weights, expert)


def quantized_matmul(
    x: Float[Array, "*G N D"], matrix: QuantizedMatrix, dtype: DTypeLike | None = None
) -> Float[Array, "*G N F"]:
    """x @ matrix for each group G. The result has `dtype`, or that of x; sums are made in at least float32."""
    if x.ndim == 3 and len(x) == 1:
        return quantized_matmul(x[0], jax.tree.map(lambda part: part[0], matrix), dtype)[None]
    if x.ndim == 3:
        # With the barrier, the result takes memory when x is there. Without it, XLA makes those of all layers at once.
        x, y = jax.lax.optimization_barrier((x, jnp.zeros((*x.shape[:2], matrix.shape[-1]), dtype or x.dtype)))

        def multiply_group(g: Array, y: Array) -> Array:
            one = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, g, keepdims=False), matrix)
            return y.at[g].set(quantized_matmul(x[g], one, dtype))

        return jax.lax.fori_loop(0, len(x), multiply_group, y)

    def in_place(x: Array, matrix: QuantizedMatrix) -> Array:
        return _few_rows(x, matrix).astype(dtype or x.dtype)

    def converted(x: Array, matrix: QuantizedMatrix) -> Array:
        product = partial(jnp.matmul, precision=dot_precision(x.dtype))
        return product(x, matrix.dequantized(x.dtype), preferred_element_type=dtype or x.dtype)

    # The codes do not change, so XLA would convert those of all layers at once, or before a loop of many tokens. With
    # the barrier the conversion waits for x.
    x, matrix = jax.lax.optimization_barrier((x, matrix))
    if len(x) <= FEW_ROWS:
        return by_platform(x, matrix, cpu=in_place, default=converted)
    if matrix.shape[-1] <= BLOCK:
        return converted(x, matrix)
    return by_platform(x, matrix, cpu=partial(_by_columns, converted), default=converted)


def _by_columns(product: Callable[[Array, QuantizedMatrix], Array], x: Array, matrix: QuantizedMatrix) -> Array:
    """product(x, matrix), BLOCK columns at a time. The last block overlaps the one before it."""

    def add_block(n: Array, y: Array) -> Array:
        # Both functions bring a start that is too large back to the last possible one.
        def columns(part: Array, size: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(part, n * size, size, axis=1)

        codes = columns(matrix.tiles, BLOCK // TILE) if matrix.tiled else columns(matrix.codes, BLOCK)
        block = replace(matrix, codes=codes.reshape(-1, BLOCK), scale=columns(matrix.scale, BLOCK))
        return jax.lax.dynamic_update_slice_in_dim(y, product(x, block), n * BLOCK, axis=1)

    y = jax.eval_shape(product, x, matrix)
    return jax.lax.fori_loop(0, -(-matrix.shape[-1] // BLOCK), add_block, jnp.zeros(y.shape, y.dtype))


def quantized_vectors_matmul(
    x: Float[Array, "K D"], matrices: QuantizedMatrix, experts: Int[Array, " K"]
) -> Float[Array, "K F"]:
    """x[k] @ matrices[experts[k]] for each k, in the dtype of x. Codes are not copied. Products with codes of 4 bits
    are computed side by side, the others one after another."""
    wide = at_least_float32(x.dtype)
    if matrices.bits == 4:
        return _sum_of_groups(x.astype(wide), matrices, experts).astype(x.dtype)

    def one(pair: tuple[Array, Array]) -> Array:
        row, expert = pair
        total = row_sum(lambda i: row[i] * row_at(matrices.codes, expert, i).astype(wide), len(row), zeros)
        return (total * row_at(matrices.scale, expert, jnp.int32(0))).astype(x.dtype)

    zeros = jnp.zeros(matrices.shape[-1], wide)
    return jax.lax.map(one, (x.astype(wide), experts))


def _few_rows(x: Float[Array, "N D"], matrix: QuantizedMatrix) -> Float[Array, "N F"]:
    """x @ matrix in at least float32, where the codes lie."""
    wide, outputs = at_least_float32(x.dtype), matrix.shape[-1]
    x, zeros = x.astype(wide), jnp.zeros((len(x), outputs), wide)
    # Rows of a multiple of 1,024 codes of 8 bits take each other's place in the cache if 32 of them are read at once.
    if matrix.bits == 4 or (outputs > MANY and outputs % 1024):
        return _sum_of_groups(x, matrix)
    codes = row_sum(lambda i: x[:, i, None] * row_at(matrix.codes, i).astype(wide), x.shape[1], zeros)
    return codes * matrix.scale[0]


def _factors(x: Float[Array, "*N R"]) -> tuple[Float[Array, "*N half_R"], Float[Array, "*N half_R"]]:
    """Two factors for each byte: one for its lower half, one for the whole byte. Their sum is both codes times their
    inputs.

    a * lower + b * upper = (a - b / 16) * lower + (b / 16) * byte, as byte = lower + 16 * upper. So one mask is enough.
    """
    half = x.shape[-1] // 2
    upper = x[..., half:] / 16
    return x[..., :half] - upper, upper


def _sum_of_groups(
    x: Float[Array, "N D"], matrix: QuantizedMatrix, experts: Int[Array, " K"] | None = None
) -> Float[Array, "N F"]:
    """x @ matrix, or x[k] @ matrix[experts[k]] for each k, in the dtype of x: one loop computes sums of a few groups,
    and a second adds these parts.

    XLA spreads the first loop over the cores. Without the barrier it would make one loop of both, which is not
    vectorised. The arrays of that loop are `[parts, F / T, N, T]`, or `[K, parts, F / T, T]` with experts.
    """
    tiles, size = matrix.tiles, group_size(x.shape[1])
    *above, groups, count, inputs, width = tiles.shape
    streams = math.gcd(groups, STREAMS) if count > 1 else 1
    tiles = tiles.reshape(*above, streams, -1, count, inputs, width)
    scale = matrix.scale.reshape(*above, streams, -1, count, width) if matrix.bits == 4 else matrix.scale
    rows = x.reshape(len(x), streams, -1, size)
    lower, upper = _factors(rows)
    offset = OFFSET * rows.sum(-1)

    def of_rows(values: Float[Array, "N parts"]) -> Array:
        return values.T[:, None, :, None] if experts is None else values[:, :, None, None]

    def of_tiles(values: Array) -> Array:
        """Of codes or scales `[*E, parts, F / T, T]`. XLA reads them inside the loop and copies nothing."""
        return values[:, :, None] if experts is None else values.at[experts].get(mode="clip")

    def products(stream: int) -> Array:
        codes = [of_tiles(tiles[..., stream, :, :, i, :]) for i in range(inputs)]
        if matrix.bits == 8:
            return _sum_in_chains([of_rows(rows[:, stream, :, i]) * c.astype(x.dtype) for i, c in enumerate(codes)])
        terms = []
        for i, both in enumerate(code.astype(jnp.int32) for code in codes):
            terms.append(of_rows(lower[:, stream, :, i]) * (both & 15).astype(x.dtype))
            terms.append(of_rows(upper[:, stream, :, i]) * both.astype(x.dtype))
        total = _sum_in_chains(terms) - of_rows(offset[:, stream])
        return total * of_tiles(scale[..., stream, :, :, :]).astype(x.dtype)

    parts = jax.lax.optimization_barrier(reduce(jnp.add, [products(stream) for stream in range(streams)]))
    # By additions: XLA does not vectorise a reduction of this axis.
    count = groups // streams
    total = reduce(jnp.add, [parts[part] if experts is None else parts[:, part] for part in range(count)])
    total = jax.lax.optimization_barrier(total)
    total = (total.swapaxes(0, 1) if experts is None else total).reshape(len(x), -1)
    return total * matrix.scale[0] if matrix.bits == 8 else total


def _sum_in_chains(terms: list[Array]) -> Array:
    """The sum of the terms: at most `_CHAINS` partial sums, and then their sum. In one chain, each addition would wait
    for the result of the one before it."""
    chains = [sum(terms[i + _CHAINS :: _CHAINS], start=term) for i, term in enumerate(terms[:_CHAINS])]
    return reduce(jnp.add, chains)
