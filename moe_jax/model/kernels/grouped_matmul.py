"""Grouped matrix product: each group of rows times the matrix of its expert.

With E experts, the first E groups belong to the experts 0 to E-1, in this order. Further groups may follow, each with
an expert of its own (`further_expert`). For the further groups there are two forms:

    copies    every group gets a copy of its expert's matrix, and all groups are one batched product
    in turn   one further group after another multiplies with its expert's matrix in place

A copy takes time and memory in proportion to the matrix, and a turn costs a fixed time. So `grouped_matmul` takes
copies where the matrix is no larger than the rows and the products of a group. On a GPU, where a turn is several
launches, the groups get copies, in the dtype of the rows. `benchmarks/performance.md` has the times of both.

The gradient of an expert's matrix is a sum over its groups. On a CPU both forms add the groups in order. On a GPU the
sum is one product with a matrix of zeros and ones (`_sum_of_groups`). The gradient of plain indexing would be a
scatter-add, whose order on a GPU differs from run to run.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.matmul import matmul, transpose_contiguous, transposed_product
from moe_jax.model.kernels.processor import by_platform
from moe_jax.model.kernels.quantized import quantized_matmul
from moe_jax.model.precision import at_least_float32, dot_precision
from moe_jax.model.quantized import QuantizedMatrix

Form = Literal["copies", "turns"]
"""How a CPU multiplies the further groups."""


def grouped_matmul(
    rows: Float[Array, "G R D"],
    weights: Float[Array, "E D F"] | QuantizedMatrix,
    further_expert: Int[Array, " further"] | None = None,
) -> Float[Array, "G R F"]:
    """rows[g] @ weights[g] for each group g < E, and rows[g] @ weights[further_expert[g - E]] for the others. The
    result has the dtype of `rows`, the gradient of `weights` has theirs.

    The first E groups are one batched product; the others are multiplied by copies or in turn (see the module).
    """
    if isinstance(weights, QuantizedMatrix):
        if further_expert is None or len(further_expert) == 0:
            return quantized_matmul(rows, weights)
        weights = weights.dequantized(rows.dtype)
    experts, width, hidden = weights.shape
    if further_expert is None or len(further_expert) == 0:
        if experts == 1:
            # A plain product. The compiler would turn the batched product into one, but lose its name (`named_scope`).
            return matmul(rows[0], weights[0])[None]
        return matmul(rows, weights)
    copied = width * hidden <= rows.shape[1] * (width + hidden)
    return _by_group(rows, weights, further_expert, "copies" if copied else "turns")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_group(
    rows: Float[Array, "G R D"], weights: Float[Array, "E D F"], further_expert: Int[Array, " further"], form: Form
) -> Float[Array, "G R F"]:
    """y_g = x_g W_e for each group g of expert e.

    d_x_g = d_y_g W_e^T        d_W_e = sum of x_g^T d_y_g over the groups g of e

    `form` says how a CPU multiplies the further groups. All other devices take copies.
    """
    on_cpu = _copied if form == "copies" else _turns
    return by_platform(rows, weights, further_expert, cpu=on_cpu, default=_copied)


def _by_group_forward(
    rows: Array, weights: Array, further_expert: Array, form: Form
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _by_group(rows, weights, further_expert, form), (rows, weights, further_expert)


def _by_group_backward(form: Form, residuals: tuple[Array, Array, Array], d_y: Array) -> tuple[Array, Array, None]:
    on_cpu = _copied_backward_in_order if form == "copies" else _turns_backward
    d_rows, d_weights = by_platform(*residuals, d_y, cpu=on_cpu, default=_copied_backward)
    return d_rows, d_weights, None


_by_group.defvjp(_by_group_forward, _by_group_backward)


def _copied(rows: Array, weights: Array, further_expert: Array) -> Array:
    return _batched("grd,gdf->grf", rows, _copies(rows, weights, further_expert))


def _copies(rows: Array, weights: Array, further_expert: Array) -> Float[Array, "G D F"]:
    """The matrix of each group in the dtype of the rows. With the barrier, the matrices are narrowed before they are
    copied: a layer has more groups than experts, and a copy of half the size takes half the time."""
    narrow = jax.lax.optimization_barrier(weights.astype(rows.dtype))
    return jnp.concatenate([narrow, narrow[further_expert]])


def _copied_backward(rows: Array, weights: Array, further_expert: Array, d_y: Array) -> tuple[Array, Array]:
    d_rows = _batched("grf,gdf->grd", d_y, _copies(rows, weights, further_expert))
    d_copies = _batched("grd,grf->gdf", rows, d_y)
    return d_rows, _sum_of_groups(d_copies, further_expert, len(weights)).astype(weights.dtype)


def _copied_backward_in_order(rows: Array, weights: Array, further_expert: Array, d_y: Array) -> tuple[Array, Array]:
    """The same for a CPU: the gradient of each copy is computed in at least float32, and the copies are added in
    order."""
    experts = len(weights)
    d_rows = _batched("grf,gdf->grd", d_y, _copies(rows, weights, further_expert))
    d_copies = transposed_product(rows, d_y)

    def add_group(g: Array, d_weights: Array) -> Array:
        return d_weights.at[further_expert[g]].add(d_copies[experts + g])

    d_weights = jax.lax.fori_loop(0, len(further_expert), add_group, d_copies[:experts])
    return d_rows, d_weights.astype(weights.dtype)


def _sum_of_groups(
    d_copies: Float[Array, "G D F"], further_expert: Int[Array, " further"], experts: int
) -> Float[Array, "E D F"]:
    """The sum over the groups of each expert, in at least float32, as one product. A NaN reaches every expert."""
    wide = at_least_float32(d_copies.dtype)
    of_expert = jnp.concatenate([jnp.arange(experts), further_expert])[None] == jnp.arange(experts)[:, None]
    return jnp.einsum(
        "eg,gdf->edf",
        of_expert.astype(d_copies.dtype),
        d_copies,
        precision=dot_precision(d_copies.dtype),
        preferred_element_type=wide,
    )


def _turns(rows: Array, weights: Array, further_expert: Array) -> Array:
    experts, precision = len(weights), dot_precision(rows.dtype)
    weights = weights.astype(rows.dtype)
    y = jnp.zeros((*rows.shape[:2], weights.shape[2]), rows.dtype)
    y = y.at[:experts].set(_batched("grd,gdf->grf", rows[:experts], weights))

    def multiply_group(g: Array, y: Array) -> Array:
        return y.at[g].set(jnp.matmul(rows[g], weights[further_expert[g - experts]], precision=precision))

    return jax.lax.fori_loop(experts, len(rows), multiply_group, y)


def _turns_backward(rows: Array, weights: Array, further_expert: Array, d_y: Array) -> tuple[Array, Array]:
    experts, wide, precision = len(weights), at_least_float32(rows.dtype), dot_precision(rows.dtype)
    narrow = weights.astype(rows.dtype)
    d_rows = jnp.zeros_like(rows).at[:experts].set(_batched("grf,gdf->grd", d_y[:experts], narrow))
    d_weights = _batched("gdr,grf->gdf", transpose_contiguous(rows[:experts]), d_y[:experts], wide)

    def add_group(g: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        d_rows, d_weights = gradients
        expert = further_expert[g - experts]
        d_x = jnp.einsum("rf,df->rd", d_y[g], narrow[expert], precision=precision)
        d_w = jnp.matmul(transpose_contiguous(rows[g]), d_y[g], precision=precision, preferred_element_type=wide)
        return d_rows.at[g].set(d_x), d_weights.at[expert].add(d_w)

    d_rows, d_weights = jax.lax.fori_loop(experts, len(rows), add_group, (d_rows, d_weights))
    return d_rows, d_weights.astype(weights.dtype)


def _batched(axes: str, left: Array, right: Array, out: jnp.dtype | None = None) -> Array:
    """A product for each group g. One group is a plain product, so that it keeps its name (see `grouped_matmul`)."""
    precision = dot_precision(left.dtype)
    if len(left) == 1:
        axes, left, right = axes.replace("g", ""), left[0], right[0]
        return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=out)[None]
    return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=out)
