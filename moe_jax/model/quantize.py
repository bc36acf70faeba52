"""Weights of 8 or 4 bits, rounded to nearest, for inference only. `kernels/quantized_matmul.py` has the two forms.

Rounded are the matrices of attention and of experts, the vocabulary head, and the embedding. The routers, the learned
positions, norms and biases stay as they are: they are small, and a router chooses between close logits. Chapter 18 of
`foundation` derives codes and scales, and what a better rounding would be.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import UserError
from moe_jax.model.kernels.quantized_matmul import QuantizedMatrix, group_size, packed
from moe_jax.model.transformer import Params

Weights = Literal["int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

MATRICES = frozenset(["qkv", "out", "w_in", "w_gate", "w_out", "head", "embedding"])
"""Names of the parameters that are rounded."""


def quantize(params: Params, weights: Weights) -> Params:
    """The parameters with the matrices rounded. An embedding `[V, D]` becomes a `QuantizedMatrix` `[D, V]`: so it also
    serves as a tied head, and each token has scales of its own.

    Raises UserError if a matrix has an entry that is not finite, or an odd number of inputs in int4. The error names
    the matrix.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    return tree.unflatten([_quantized_leaf(path, leaf, weights) for path, leaf in leaves])


def quantized_shapes(shapes: Params, weights: Weights) -> Params:
    """The shapes and dtypes of `quantize(params, weights)`. Allocates nothing."""

    def shape_of(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        rounded = _last_name(path) in MATRICES
        return jax.eval_shape(lambda w: _rounded(_oriented(path, w), weights), leaf) if rounded else leaf

    return jax.tree_util.tree_map_with_path(shape_of, shapes)


def _quantized_leaf(path: jax.tree_util.KeyPath, leaf: Array, weights: Weights) -> Array | QuantizedMatrix:
    if _last_name(path) not in MATRICES:
        return leaf
    matrix, name = _oriented(path, leaf), jax.tree_util.keystr(path, simple=True, separator=".")
    if not bool(jnp.isfinite(matrix).all()):
        raise UserError(f"{name}: has entries that are not finite; take another checkpoint (--step)")
    if weights == "int4" and matrix.shape[-2] % 2:
        raise UserError(f"{name}: has {matrix.shape[-2]} inputs, and int4 packs two into a byte; take --to int8")
    return jax.jit(_rounded, static_argnums=1)(matrix, weights)


def _last_name(path: jax.tree_util.KeyPath) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def _oriented(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
    return leaf.T if _last_name(path) == "embedding" else leaf


def _rounded(matrix: Float[Array, "*E D F"], weights: Weights) -> QuantizedMatrix:
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
