"""Matrices of 8 or 4 bits a weight, for inference only: what they hold, and how they are rounded.

    int8    a weight is code * scale, with a code from -127 to 127 and one float32 scale for each output
    int4    a weight is code * scale, with a code from -7 to 7 and one bfloat16 scale for each output and 32 inputs

Their products with activations: `kernels/quantized.py`.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from types import EllipsisType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, Integer, UInt8

from moe_jax.config import UserError
from moe_jax.model.precision import at_least_float32

GROUP = 32
"""Inputs that share a scale in int4."""
TILE = 16
"""Outputs of a tile: the numbers of a vector of 512 bits."""
OFFSET = 8
"""Codes of 4 bits are stored as 1 to 15: what is added to them."""


def group_size(inputs: int) -> int:
    """Inputs of a group: 32, or their largest divisor that divides `inputs` too."""
    return math.gcd(inputs, GROUP)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes and scales of a matrix `[*E, D, F]`: D inputs, F outputs, perhaps E experts.

    It stands in a parameter in place of an array: `param[...]` and `shape` are as an array's.
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

    def dequantized(self, dtype: DTypeLike) -> Float[Array, "*E D F"]:
        """The matrix that the codes stand for, in `dtype`. It is computed in at least float32."""
        wide = at_least_float32(dtype)
        values = _integers(self).astype(wide) * self.scale.astype(wide)[..., :, None, :]
        return values.reshape(self.shape).astype(dtype)

    def columns(self, ids: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        """The weights of some outputs in float32: rows of an embedding, which is kept as `[D, V]`."""
        flat, tiles = ids.reshape(-1), self.tiles
        codes = tiles[:, flat // tiles.shape[-1], :, flat % tiles.shape[-1]].reshape(flat.size, -1).T
        chosen = QuantizedMatrix(codes, self.scale[:, flat])
        return chosen.dequantized(jnp.float32).T.reshape(*ids.shape, -1)


def as_array(weights: Array | QuantizedMatrix, dtype: DTypeLike) -> Float[Array, "*E D F"]:
    """The weights as an array in `dtype`, quantised or not."""
    return weights.dequantized(dtype) if isinstance(weights, QuantizedMatrix) else weights.astype(dtype)


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
    return halves.astype(jnp.int8) - OFFSET


def packed(codes: Int8[Array, "*E groups R F"]) -> UInt8[Array, "*E groups half_R F"]:
    """Codes from -7 to 7, two in a byte. R must be even."""
    lower, upper = jnp.split((codes + OFFSET).astype(jnp.uint8), 2, axis=-2)
    return lower | (upper << 4)


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


def dequantize(params: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """The arrays that `quantize(params, ...)` stands for, in the shapes and dtypes of the plain model, `shapes`."""

    def array(path: jax.tree_util.KeyPath, shape: jax.ShapeDtypeStruct, leaf: Array | QuantizedMatrix) -> Array:
        if not isinstance(leaf, QuantizedMatrix):
            return leaf.astype(shape.dtype)
        matrix = leaf.dequantized(shape.dtype)
        return matrix.T if jax.tree_util.keystr(path, simple=True).endswith("embedding") else matrix

    return jax.tree_util.tree_map_with_path(array, shapes, params)


def quantized_shapes(shapes: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The shapes and dtypes of `quantize(params, weights)`. Allocates nothing. Raises the same error."""
    return jax.eval_shape(partial(quantize, weights=weights), shapes)


def rounded(matrix: Float[Array, "*E D F"], weights: Weights) -> QuantizedMatrix:
    """The nearest codes. An entry is off by at most half the scale of its group, plus the rounding of the scale.

    The scale is the largest magnitude of the group, divided by the largest code. A group of zeros has scale 0, and one
    with a value that is not finite has scale NaN. In int4 the codes are found with the scale after its rounding to
    bfloat16.
    """
    *experts, inputs, outputs = matrix.shape
    size = inputs if weights == "int8" else group_size(inputs)
    codes, scale = _nearest(matrix.reshape(*experts, inputs // size, size, outputs), weights)
    codes = codes if weights == "int8" else packed(codes)
    return QuantizedMatrix(codes.reshape(*experts, -1, outputs), scale)


def _nearest(
    groups: Float[Array, "*E groups R F"], weights: Weights
) -> tuple[Int8[Array, "*E groups R F"], Float[Array, "*E groups F"]]:
    """Codes, and the scale of each group."""
    largest, dtype = (127, jnp.float32) if weights == "int8" else (7, jnp.bfloat16)
    groups = groups.astype(jnp.float32)
    # XLA's maximum leaves a NaN out on some processors, so finiteness is a question of its own.
    most = jnp.where(jnp.isfinite(groups).all(-2), jnp.abs(groups).max(-2), jnp.nan)
    scale = (most / largest).astype(dtype)
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None, :]
    return jnp.round(groups / divisor).clip(-largest, largest).astype(jnp.int8), scale
