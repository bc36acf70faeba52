"""Matrix products in forms that are fast on a CPU: `matmul` with its gradients, and `vector_matmul` with one expert.

On a CPU, XLA calls a library that sums along the last axis, in memory order, of the left operand. The gradient of the
weights of `x @ w` is x^T d_y, which sums over the first axis of x. In bfloat16 x^T is written to memory first, or the
library falls back to float32; in float32 that costs more than it saves (`benchmarks/performance.md`). On a GPU a
transposed operand costs nothing, so x^T is not written to memory.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.quantized import quantized_matmul, quantized_vectors_matmul
from moe_jax.model.kernels.row_sum import row_at, row_sum
from moe_jax.model.precision import at_least_float32, dot_precision
from moe_jax.model.quantized import QuantizedMatrix


def transpose_contiguous(x: Float[Array, "*G N D"]) -> Float[Array, "*G D N"]:
    """x with its last two axes swapped. On a CPU, an x narrower than float32 is written to memory in the new order."""

    def written(x: Array) -> Array:
        return with_layout_constraint(x.swapaxes(-1, -2), Layout(major_to_minor=tuple(range(x.ndim))))

    if x.dtype.itemsize >= 4:
        return x.swapaxes(-1, -2)
    return jax.lax.platform_dependent(x, cpu=written, default=lambda x: x.swapaxes(-1, -2))


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
    return jax.lax.platform_dependent(product, cpu=jax.lax.optimization_barrier, default=lambda product: product)


def matmul(x: Float[Array, "*G N D"], weights: Float[Array, "*G D F"] | QuantizedMatrix) -> Float[Array, "*G N F"]:
    """x @ weights for each group G, in the dtype of x. `weights` may be wider than x; their gradient has the dtype of
    `weights`. Quantised weights have no gradient.

    On a CPU, a single row is multiplied where the weights lie (`row_sum`). Writing a text is bound by reading them.

    On a CPU the gradient of the weights is computed in at least float32. On a GPU it is summed in float32 too, but
    rounded to the dtype of x and kept in it until the optimizer needs it.

        d_x = d_y weights^T        d_weights = x^T d_y
    """
    return quantized_matmul(x, weights) if isinstance(weights, QuantizedMatrix) else _matmul(x, weights)


@jax.custom_vjp
def _matmul(x: Float[Array, "*G N D"], weights: Float[Array, "*G D F"]) -> Float[Array, "*G N F"]:
    def product(x: Array, weights: Array) -> Array:
        return jnp.matmul(x, weights.astype(x.dtype), precision=dot_precision(x.dtype))

    def in_place(x: Array, weights: Array) -> Array:
        return _sum_of_rows(x[0], weights)[None]

    if x.shape[:-1] != (1,):
        return product(x, weights)
    return jax.lax.platform_dependent(x, weights, cpu=in_place, default=product)


def _sum_of_rows(x: Float[Array, " D"], weights: Float[Array, "*E D F"], *index: Int[Array, ""]) -> Float[Array, " F"]:
    """x @ weights[*index] in the dtype of x, summed in at least float32."""
    wide = at_least_float32(x.dtype)

    def term(i: Int[Array, ""]) -> Array:
        return x[i].astype(wide) * row_at(weights, *index, i).astype(x.dtype).astype(wide)

    return row_sum(term, len(x), jnp.zeros(weights.shape[-1], wide)).astype(x.dtype)


def _forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, weights), (x, weights)


def _backward(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weights = residuals
    precision = dot_precision(x.dtype)
    d_x = jnp.einsum("...nf,...df->...nd", d_y, weights.astype(x.dtype), precision=precision)

    def summed_wide(x: Array, d_y: Array) -> Array:
        return transposed_product(x, d_y).astype(weights.dtype)

    def summed_as_it_is(x: Array, d_y: Array) -> Array:
        return jnp.matmul(x.swapaxes(-1, -2), d_y, precision=precision).astype(weights.dtype)

    return d_x, jax.lax.platform_dependent(x, d_y, cpu=summed_wide, default=summed_as_it_is)


_matmul.defvjp(_forward, _backward)


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
        return _sum_of_rows(x.reshape(-1).astype(wide), weights).reshape(*x.shape[:-1], -1)

    if x.size > x.shape[-1]:
        return product(x, weights)
    on_cpu = product if x.dtype == wide else in_place
    return jax.lax.platform_dependent(x, weights, cpu=on_cpu, default=_row_matmul)


def _row_matmul(x: Float[Array, "*N D"], weights: Float[Array, "D F"]) -> Float[Array, "*N F"]:
    wide = at_least_float32(x.dtype)
    return (x.astype(wide)[..., None] * weights.astype(wide)).sum(-2)


def vector_matmul(
    x: Float[Array, " D"], weights: Float[Array, "E D F"] | QuantizedMatrix, expert: Int[Array, ""]
) -> Float[Array, " F"]:
    """x @ weights[expert] in the dtype of x, summed in at least float32. On a CPU the weights are read in place."""
    if isinstance(weights, QuantizedMatrix):
        return quantized_vectors_matmul(x[None], weights, expert[None])[0]
    return _sum_of_rows(x, weights, expert)
