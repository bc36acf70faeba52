"""Matrices of 8 or 4 bits a weight, for inference only: rounding them, and their products with activations.

    int8    a weight is code * scale, with a code from -127 to 127 and one float32 scale for each output
    int4    a weight is code * scale, with a code from -7 to 7 and one bfloat16 scale for each output and 32 inputs

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
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from types import EllipsisType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, Integer, UInt8

from moe_jax.config import UserError
from moe_jax.model.kernels.row_sum import row_at, row_sum
from moe_jax.model.precision import at_least_float32, dot_precision

GROUP = 32
"""Inputs that share a scale in int4."""
FEW_ROWS = 4
"""Most rows of a product that reads the codes in place. With more, the matrix is converted first."""
BLOCK = 4096
"""Columns that are converted at once: a vocabulary head does not fit the cache."""
MANY = 16384
"""Outputs of a matrix from which a product of few rows is worth several cores."""
TILE = 16
"""Outputs of a tile: the numbers of a vector of 512 bits."""
STREAMS = 4
"""Distant groups whose tiles are read in turn. So the core fetches ahead in as many places."""
_CHAINS = 8
_OFFSET = 8
"""Codes of 4 bits are stored as 1 to 15: what is added to them."""


def group_size(inputs: int) -> int:
    """Inputs of a group: 32, or their largest divisor that divides `inputs` too."""
    return math.gcd(inputs, GROUP)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes and scales of a matrix `[*E, D, F]`: D inputs, F outputs, perhaps E experts.

    It stands in a parameter in place of an array: `param[...]`, `shape` and `astype` are as an array's.
    """

    codes: Any
    """int8 `[*E, D, F]`: the codes. Or uint8 `[*E, D / 2, F]`: two codes of 4 bits, each plus 8. Of a group of R
    inputs, byte i holds input i in its lower half and input i + R / 2 in its upper half."""
    scale: Any
    """float32 `[*E, 1, F]`, or bfloat16 `[*E, D / R, F]`. While jax traces, both fields may hold shapes instead of
    arrays."""
    tiled: bool = field(default=False, metadata={"static": True})
    """Whether the bytes of each matrix of 4 bits have the order `[D / R, F / T, R / 2, T]`: see `in_tiles`."""

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == jnp.int8 else 4

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, rows, outputs = self.codes.shape
        return (*experts, rows * 8 // self.bits, outputs)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def __getitem__(self, index: EllipsisType) -> "QuantizedMatrix":
        assert index is ..., "a quantised matrix is read whole"
        return self

    @property
    def tiles(self) -> Integer[Array, "*E groups tiles rows T"]:
        """The codes as they lie in memory. Without tiles, all outputs are one tile. A group has R rows, or R / 2 with
        two codes in a byte."""
        *experts, inputs, outputs = self.shape
        groups, width = inputs // group_size(inputs), TILE if self.tiled else outputs
        return self.codes.reshape(*experts, groups, outputs // width, -1, width)

    def astype(self, dtype: DTypeLike) -> Float[Array, "*E D F"]:
        """The matrix that the codes stand for, in `dtype`. It is computed in at least float32."""
        wide = at_least_float32(dtype)
        values = _integers(self).astype(wide) * self.scale.astype(wide)[..., :, None, :]
        return values.reshape(self.shape).astype(dtype)

    def columns(self, ids: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        """The weights of some outputs in float32: rows of an embedding, which is kept as `[D, V]`."""
        flat, tiles = ids.reshape(-1), self.tiles
        codes = tiles[:, flat // tiles.shape[-1], :, flat % tiles.shape[-1]].reshape(flat.size, -1).T
        chosen = QuantizedMatrix(codes, self.scale[:, flat])
        return chosen.astype(jnp.float32).T.reshape(*ids.shape, -1)


def _integers(matrix: QuantizedMatrix) -> Int8[Array, "*E groups R F"]:
    """The codes of each group, as signed integers."""
    *experts, groups, outputs = matrix.scale.shape
    codes = matrix.codes
    if matrix.tiled:  # In this layout and with the barrier, XLA moves vectors of codes and then converts long rows.
        rows = matrix.tiles.swapaxes(-2, -3)
        written = with_layout_constraint(rows, Layout(major_to_minor=tuple(range(rows.ndim))))
        codes = jax.lax.optimization_barrier(written)
    codes = codes.reshape(*experts, groups, -1, outputs)
    if matrix.bits == 8:
        return codes
    halves = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
    return halves.astype(jnp.int8) - _OFFSET


def packed(codes: Int8[Array, "*E groups R F"]) -> UInt8[Array, "*E groups half_R F"]:
    """Codes from -7 to 7, two in a byte. R must be even."""
    lower, upper = jnp.split((codes + _OFFSET).astype(jnp.uint8), 2, axis=-2)
    return lower | (upper << 4)


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
        return product(x, matrix.astype(x.dtype), preferred_element_type=dtype or x.dtype)

    # The codes do not change, so XLA would convert those of all layers at once, or before a loop of many tokens. With
    # the barrier the conversion waits for x.
    x, matrix = jax.lax.optimization_barrier((x, matrix))
    if len(x) <= FEW_ROWS:
        return jax.lax.platform_dependent(x, matrix, cpu=in_place, default=converted)
    if matrix.shape[-1] <= BLOCK:
        return converted(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=partial(_by_columns, converted), default=converted)


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
    offset = _OFFSET * rows.sum(-1)

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


def in_tiles(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as a CPU reads them fastest: with codes of 4 bits in tiles, where the outputs are a multiple of
    TILE. The tiles take the memory of the codes that are given, which cannot be used any more."""

    def tiled(matrix: Any) -> Any:
        if not isinstance(matrix, QuantizedMatrix) or matrix.bits == 8 or matrix.shape[-1] % TILE:
            return matrix
        return replace(matrix, codes=_tiled(matrix.codes, matrix.tiles.shape[-4]), tiled=True)

    if jax.default_backend() != "cpu":
        return params
    return jax.tree.map(tiled, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def _tiled(codes: UInt8[Array, "*E half_D F"], groups: int) -> UInt8[Array, "*E half_D F"]:
    *experts, _, outputs = codes.shape
    tiles = codes.reshape(*experts, groups, -1, outputs // TILE, TILE).swapaxes(-2, -3)
    return jax.lax.optimization_barrier(tiles).reshape(codes.shape)


# Rounding the matrices of a model
#
# Rounded to nearest are the matrices of attention and of experts, the vocabulary head, and the embedding. The routers,
# the learned positions, norms and biases stay as they are: they are small, and a router chooses between close logits.
# Chapter 18 of `foundation` derives codes and scales, and what a better rounding would be.

Weights = Literal["int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

MATRICES = frozenset(["qkv", "out", "w_in", "w_gate", "w_out", "head", "embedding"])
"""Names of the parameters that are rounded."""


def quantize(params: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The parameters with the matrices rounded. An embedding `[V, D]` becomes a `QuantizedMatrix` `[D, V]`: so it also
    serves as a tied head, and each token has scales of its own.

    Raises UserError, with the name of the matrix, for an odd number of inputs in int4.
    """

    def quantized(path: jax.tree_util.KeyPath, leaf: Array) -> Array | QuantizedMatrix:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        kind = name.rpartition(".")[2]
        if kind not in MATRICES:
            return leaf
        matrix = leaf.T if kind == "embedding" else leaf
        if weights == "int4" and matrix.shape[-2] % 2:
            raise UserError(f"{name}: has {matrix.shape[-2]} inputs, and int4 packs two into a byte; take int8")
        return jax.jit(rounded, static_argnums=1)(matrix, weights)

    return jax.tree_util.tree_map_with_path(quantized, params)


def quantized_shapes(shapes: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The shapes and dtypes of `quantize(params, weights)`. Allocates nothing. Raises the same error."""
    return jax.eval_shape(partial(quantize, weights=weights), shapes)


def rounded(matrix: Float[Array, "*E D F"], weights: Weights) -> QuantizedMatrix:
    """The nearest codes. An entry is off by at most half the scale of its group.

    The scale is the largest magnitude of the group, divided by the largest code. A group of zeros has scale 0. In int4
    the codes are found with the scale after its rounding to bfloat16.
    """
    *experts, inputs, outputs = matrix.shape
    size = _inputs_of_a_scale(inputs, weights)
    codes, scale = _nearest(matrix.reshape(*experts, inputs // size, size, outputs), -2, weights)
    codes = codes if weights == "int8" else packed(codes)
    return QuantizedMatrix(codes.reshape(*experts, -1, outputs), scale)


def rounded_rows(rows: Float[Array, "F D"], weights: Weights) -> QuantizedMatrix:
    """`rounded(rows.T, weights)`, bit for bit. The codes are turned instead of the matrix, so that it is read in the
    order of memory: on a CPU twice as fast in int8, and 1.4 times in int4."""
    outputs, inputs = rows.shape
    size = _inputs_of_a_scale(inputs, weights)
    codes, scale = _nearest(rows.reshape(outputs, inputs // size, size), -1, weights)
    if weights == "int8":
        return QuantizedMatrix(codes.reshape(rows.shape).T, scale.T)
    codes = jax.lax.optimization_barrier(codes)  # else a loop over the bytes computes the codes in their order
    return QuantizedMatrix(packed(codes.transpose(1, 2, 0)).reshape(-1, outputs), scale.T)


def _inputs_of_a_scale(inputs: int, weights: Weights) -> int:
    return inputs if weights == "int8" else group_size(inputs)


def _nearest(
    groups: Float[Array, "..."], axis: int, weights: Weights
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Codes, and the scale of each group. The inputs of a group lie along `axis`."""
    largest, dtype = (127, jnp.float32) if weights == "int8" else (7, jnp.bfloat16)
    groups = groups.astype(jnp.float32)
    scale = (jnp.abs(groups).max(axis) / largest).astype(dtype)
    divisor = jnp.expand_dims(jnp.where(scale > 0, scale, 1).astype(jnp.float32), axis)
    return jnp.round(groups / divisor).clip(-largest, largest).astype(jnp.int8), scale
