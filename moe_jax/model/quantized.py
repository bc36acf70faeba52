"""Matrices of 8 or 4 bits a weight, for inference only: rounding them, and their products with activations.

    int8    a weight is code * scale, with a code from -127 to 127 and one float32 scale for each output
    int4    a weight is code * scale, with a code from -7 to 7 and one bfloat16 scale for each output and 32 inputs

Decoding is bound by reading weights, so a product of few rows must read each code once, and nothing else of that size.
XLA's own products on a CPU write the converted matrix to memory first. Here the codes are converted in registers: by
`row_sum` on one core, or by a sum of groups on all cores: codes of 4 bits, whose conversion takes longer than reading
them, and the many outputs of a vocabulary head.

A product of many rows is bound by arithmetic. There the matrix is converted first, and one matrix is converted at a
time: the copy of one expert fits the cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from types import EllipsisType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, UInt8

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

    def astype(self, dtype: DTypeLike) -> Float[Array, "*E D F"]:
        """The matrix that the codes stand for, in `dtype`. It is computed in at least float32."""
        wide = at_least_float32(dtype)
        values = _integers(self).astype(wide) * self.scale.astype(wide)[..., :, None, :]
        return values.reshape(self.shape).astype(dtype)

    def columns(self, ids: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        """The weights of some outputs in float32: rows of an embedding, which is kept as `[D, V]`."""
        chosen = QuantizedMatrix(self.codes[:, ids.reshape(-1)], self.scale[:, ids.reshape(-1)])
        return chosen.astype(jnp.float32).T.reshape(*ids.shape, -1)


def _integers(matrix: QuantizedMatrix) -> Int8[Array, "*E groups R F"]:
    """The codes of each group, as signed integers."""
    *experts, groups, outputs = matrix.scale.shape
    codes = matrix.codes.reshape(*experts, groups, -1, outputs)
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
        block = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, n * BLOCK, BLOCK, axis=1), matrix)
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
    if (len(x) == 1 and matrix.bits == 4) or (outputs > MANY and outputs % 1024):
        return _sum_of_groups(x, matrix)
    if matrix.bits == 8:
        codes = row_sum(lambda i: x[:, i, None] * row_at(matrix.codes, i).astype(wide), x.shape[1], zeros)
        return codes * matrix.scale[0]
    size = group_size(x.shape[1])

    def add_group(group: Int[Array, ""], total: Array) -> Array:
        mine = jax.lax.dynamic_slice_in_dim(x, group * size, size, axis=1)
        lower, upper = _factors(mine)

        def term(i: Int[Array, ""]) -> Array:
            both = row_at(matrix.codes, group * (size // 2) + i).astype(jnp.int32)
            return lower[:, i, None] * (both & 15).astype(wide) + upper[:, i, None] * both.astype(wide)

        part = row_sum(term, size // 2, zeros - _OFFSET * mine.sum(1, keepdims=True))
        return total + part * row_at(matrix.scale, group).astype(wide)

    return jax.lax.fori_loop(0, x.shape[1] // size, add_group, zeros)


def _factors(x: Float[Array, "*N R"]) -> tuple[Float[Array, "*N half_R"], Float[Array, "*N half_R"]]:
    """Two factors for each byte: one for its lower half, one for the whole byte. Their sum is both codes times their
    inputs.

    a * lower + b * upper = (a - b / 16) * lower + (b / 16) * byte, as byte = lower + 16 * upper. So one mask is enough.
    """
    half = x.shape[-1] // 2
    upper = x[..., half:] / 16
    return x[..., :half] - upper, upper


def _sum_of_groups(
    x: Float[Array, "N D"], matrix: QuantizedMatrix, experts: Int[Array, " N"] | None = None
) -> Float[Array, "N F"]:
    """x @ matrix, or x[n] @ matrix[experts[n]] for each n, in the dtype of x: one loop computes the sum of each group
    of R inputs, and a second adds the groups.

    XLA spreads the first loop over the cores. Without the barrier it would make one loop of both, which is not
    vectorised.
    """
    size, outputs = group_size(x.shape[1]), matrix.shape[-1]
    rows, scale = x.reshape(len(x), -1, size), matrix.scale
    codes = matrix.codes.reshape(*matrix.codes.shape[:-2], rows.shape[1], -1, outputs)

    def of_all(part: Array, *index: Any) -> Array:
        """part[index], or part[experts, index]. XLA reads it inside the loop and copies nothing."""
        return part.at[index if experts is None else (experts, *index)].get(mode="clip")

    if matrix.bits == 8:
        terms = [rows[:, :, i, None] * of_all(codes, slice(None), i).astype(x.dtype) for i in range(size)]
        parts = _sum_in_chains(terms)
    else:
        lower, upper = _factors(rows)
        terms = []
        for i in range(size // 2):
            both = of_all(codes, slice(None), i).astype(jnp.int32)
            terms.append(lower[:, :, i, None] * (both & 15).astype(x.dtype))
            terms.append(upper[:, :, i, None] * both.astype(x.dtype))
        parts = (_sum_in_chains(terms) - _OFFSET * rows.sum(2)[..., None]) * of_all(scale, slice(None)).astype(x.dtype)
    parts = jax.lax.optimization_barrier(parts)
    # By additions: XLA does not vectorise a reduction of this axis.
    total = reduce(jnp.add, [parts[:, group] for group in range(parts.shape[1])])
    return jax.lax.optimization_barrier(total * of_all(scale, 0).astype(x.dtype) if matrix.bits == 8 else total)


def _sum_in_chains(terms: list[Array]) -> Array:
    """The sum of the terms: at most `_CHAINS` partial sums, and then their sum. In one chain, each addition would wait
    for the result of the one before it."""
    chains = [sum(terms[i + _CHAINS :: _CHAINS], start=term) for i, term in enumerate(terms[:_CHAINS])]
    return reduce(jnp.add, chains)


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
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    return tree.unflatten([_quantized_leaf(path, leaf, weights) for path, leaf in leaves])


def quantized_shapes(shapes: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The shapes and dtypes of `quantize(params, weights)`. Allocates nothing. Raises the same error."""

    def shape_of(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        if _last_name(path) not in MATRICES:
            return leaf
        _check_inputs(path, leaf, weights)
        return jax.eval_shape(lambda w: rounded(_oriented(path, w), weights), leaf)

    return jax.tree_util.tree_map_with_path(shape_of, shapes)


def _quantized_leaf(path: jax.tree_util.KeyPath, leaf: Array, weights: Weights) -> Array | QuantizedMatrix:
    if _last_name(path) not in MATRICES:
        return leaf
    _check_inputs(path, leaf, weights)
    return jax.jit(rounded, static_argnums=1)(_oriented(path, leaf), weights)


def _check_inputs(path: jax.tree_util.KeyPath, leaf: Any, weights: Weights) -> None:
    inputs = leaf.shape[-1 if _last_name(path) == "embedding" else -2]
    if weights == "int4" and inputs % 2:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        raise UserError(f"{name}: has {inputs} inputs, and int4 packs two into a byte; take int8")


def _last_name(path: jax.tree_util.KeyPath) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def _oriented(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
    return leaf.T if _last_name(path) == "embedding" else leaf


def rounded(matrix: Float[Array, "*E D F"], weights: Weights) -> QuantizedMatrix:
    """The nearest codes. An entry is off by at most half the scale of its group.

    The scale is the largest magnitude of the group, divided by the largest code. A group of zeros has scale 0. In int4
    the codes are found with the scale after its rounding to bfloat16.
    """
    *experts, inputs, outputs = matrix.shape
    largest, size = (127, inputs) if weights == "int8" else (7, group_size(inputs))
    groups = matrix.astype(jnp.float32).reshape(*experts, inputs // size, size, outputs)
    scale = jnp.abs(groups).max(-2) / largest
    scale = scale if weights == "int8" else scale.astype(jnp.bfloat16)
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None, :]
    codes = jnp.round(groups / divisor).clip(-largest, largest).astype(jnp.int8)
    if weights == "int4":
        codes = packed(codes)
    return QuantizedMatrix(codes.reshape(*experts, -1, outputs), scale)
