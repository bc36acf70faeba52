"""Matrix products that a CPU computes as fast as it can: those with gradients, and those of a single row.

XLA hands a CPU's products to a library, which has two questions of its operands: along which axis they are summed, and
how they lie in memory. The left operand must be summed along its last axis. The gradient of the weights of `x @ w`,
x^T d_y, sums over the rows of x, which is the first. Measured on a CPU with bfloat16 matrix units, 16 experts of
320 x 512 x 1024: 240 GFLOP/s as it stands, by way of float32, against 950 once x^T lies in memory as it is written,
the turning included. In float32 turning costs as much as it saves: a layer of `seed-158m` took 122 ms with it and 111
without. On a GPU a transposed operand costs nothing, and nothing is turned.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from moe_jax.model.precision import at_least_float32

TERMS = 16
"""Rows of a matrix that one pass of `row_product` adds up."""


def turned(x: Float[Array, "*G N D"]) -> Float[Array, "*G D N"]:
    """x with its last two axes swapped; where it is narrower than float32, on a CPU, written out like that."""

    def written(x: Array) -> Array:
        return with_layout_constraint(x.swapaxes(-1, -2), Layout(major_to_minor=tuple(range(x.ndim))))

    if x.dtype.itemsize >= 4:
        return x.swapaxes(-1, -2)
    return jax.lax.platform_dependent(x, cpu=written, default=lambda x: x.swapaxes(-1, -2))


@jax.custom_vjp
def product(x: Float[Array, "*G N D"], weights: Float[Array, "*G D F"]) -> Float[Array, "*G N F"]:
    """x @ weights in the dtype of x, group by group. `weights` may be wider than x; their gradient has their dtype.

    A CPU gives that gradient in at least float32. Elsewhere it is in the dtype of x at first, though summed in float32
    within, so that it takes no more memory until the optimizer needs it: 150 MiB of a step of `seed-158m` on a GPU.

        d_x = d_y weights^T        d_weights = x^T d_y
    """
    return jnp.matmul(x, weights.astype(x.dtype))


def _forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, weights), (x, weights)


def _backward(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weights = residuals
    d_x = jnp.einsum("...nf,...df->...nd", d_y, weights.astype(x.dtype))

    def summed_wide(x: Array, d_y: Array) -> Array:
        wide = at_least_float32(x.dtype)
        return jnp.matmul(turned(x), d_y, preferred_element_type=wide).astype(weights.dtype)

    def summed_as_it_is(x: Array, d_y: Array) -> Array:
        return jnp.matmul(x.swapaxes(-1, -2), d_y).astype(weights.dtype)

    return d_x, jax.lax.platform_dependent(x, d_y, cpu=summed_wide, default=summed_as_it_is)


product.defvjp(_forward, _backward)


def row_product(x: Float[Array, " D"], weights: Float[Array, "E D F"], expert: Int[Array, ""]) -> Float[Array, " F"]:
    """x @ weights[expert] in the dtype of x, summed in at least float32, for a program that waits for the reading.

    On a CPU a matrix that is chosen by an index is written out first, whether a product or a sum of the rows follows:
    both go to a library, which needs its operands in memory. A loop that XLA compiles itself takes the rows from where
    they are. The sum of a few rows becomes one by ending in `where`, which the library has not; the condition always
    holds. Measured on an Intel Xeon, with 4 MB of weights a token and layer: 30 GB/s instead of 11, as fast as memory
    is read.
    """
    experts, width, hidden = weights.shape
    wide = at_least_float32(x.dtype)
    terms = math.gcd(width, TERMS)
    rows = weights.reshape(experts, terms, width // terms, hidden)
    total = jnp.zeros((), wide)
    for n, scale in enumerate(x.reshape(terms, -1).astype(wide)):
        part = jax.lax.dynamic_index_in_dim(rows[:, n], expert, keepdims=False)
        total = total + scale[:, None] * part.astype(x.dtype).astype(wide)
    return jnp.where(expert >= 0, total, 0).sum(0).astype(x.dtype)
