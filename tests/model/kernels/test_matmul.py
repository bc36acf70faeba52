"""Matrix products with gradients of their own, of a row, of rows and of groups of rows, against NumPy and loops."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from moe_jax.model.kernels.matmul import _row_matmul, matmul, matmul_wide, vector_matmul

SHAPES = {"plain": ((37, 12), (12, 20)), "a group each": ((3, 37, 12), (3, 12, 20)), "one row": ((1, 12), (12, 20))}


def drawn(shapes: tuple[tuple[int, ...], ...], dtype: type) -> list[np.ndarray]:
    """Arrays whose entries `dtype` holds exactly, in float64."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype).astype(np.float64) for shape in shapes]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 2**-8)])
def test_matmul_and_gradients_against_numpy(kind: str, dtype: type, rounding: float) -> None:
    """`rounding` is of what has the dtype of x; the weights stay float32, and so does the sum of their gradient."""
    x, weights = drawn(SHAPES[kind], dtype)
    y, pull = jax.vjp(matmul, jnp.asarray(x, dtype), jnp.asarray(weights, jnp.float32))
    (cotangent,) = drawn((y.shape,), dtype)
    d_x, d_weights = pull(jnp.asarray(cotangent, dtype))
    assert (y.dtype, d_x.dtype, d_weights.dtype) == (dtype, dtype, np.float32)
    size = np.sqrt(x.shape[-1])
    np.testing.assert_allclose(np.asarray(y, float), x @ weights, rtol=rounding, atol=4 * size * rounding)
    expected = cotangent @ weights.swapaxes(-1, -2)
    np.testing.assert_allclose(np.asarray(d_x, float), expected, rtol=rounding, atol=4 * size * rounding)
    np.testing.assert_allclose(d_weights, x.swapaxes(-1, -2) @ cotangent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [48, 21])
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 2**-8)])
def test_vector_matmul_against_numpy(width: int, dtype: type, rounding: float) -> None:
    """A width that is a multiple of `matmul.ROWS`, and one that is not."""
    x, weights = drawn(((width,), (5, width, 20)), dtype)
    y = jax.jit(vector_matmul)(jnp.asarray(x, dtype), jnp.asarray(weights, jnp.float32), jnp.int32(3))
    assert y.dtype == dtype
    # Products of bfloat16 are exact in float32, so only the sum and the result are rounded.
    np.testing.assert_allclose(np.asarray(y, float), x @ weights[3], rtol=rounding, atol=1e-6 * np.sqrt(width))


@pytest.mark.parametrize("multiply", [matmul_wide, _row_matmul], ids=["cpu", "gpu"])
def test_the_product_of_a_row_against_numpy(multiply, float64: None) -> None:
    rng = np.random.default_rng(3)
    x, weights = rng.normal(size=(1, 7)), rng.normal(size=(7, 5))
    np.testing.assert_allclose(multiply(jnp.asarray(x), jnp.asarray(weights)), x @ weights, rtol=1e-13)
    narrow = multiply(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.bfloat16))
    exact = np.asarray(jnp.asarray(x, jnp.bfloat16), float) @ np.asarray(jnp.asarray(weights, jnp.bfloat16), float)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, exact, rtol=1e-5)  # products of bfloat16 are exact in float32, sums are not


def test_products_of_one_row_write_no_matrix() -> None:
    """The temporary arrays of the compiled program of a CPU are as large as a few rows. They hold neither a copy of the
    expert's matrix nor the matrix in bfloat16."""

    def temporary(multiply, *arguments: jax.Array) -> int:
        compiled = jax.jit(multiply).trace(*arguments).lower(lowering_platforms=("cpu",)).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    weights, few_rows = jnp.zeros((4, 512, 256)), 8 * 256 * 4
    assert temporary(vector_matmul, jnp.zeros(512), weights, jnp.int32(3)) <= few_rows
    narrow = jnp.zeros((1, 512), jnp.bfloat16)
    assert temporary(matmul, narrow, weights[0]) <= few_rows
    assert temporary(matmul_wide, narrow, weights[0].astype(jnp.bfloat16)) <= few_rows


@pytest.mark.parametrize("kind", ["plain", "a group each"])
def test_left_operands_are_summed_along_the_axis_that_is_contiguous(kind: str) -> None:
    """Of all three products, in bfloat16, in the compiled program of a CPU: what its library multiplies fast."""
    x, weights = (jnp.zeros(shape, jnp.bfloat16) for shape in SHAPES[kind])

    def all_three(x: jax.Array, weights: jax.Array, d_y: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(matmul, x, weights)
        return y, *pull(d_y)

    text = jax.jit(all_three).trace(x, weights, x @ weights).lower(lowering_platforms=("cpu",)).compile().as_text()
    assert text is not None
    layouts = dict(re.findall(r"%?([\w.\-]+) = \w+\[[\d,]*\]\{([\d,]+)", text))
    dots = re.findall(r" dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+),.*lhs_contracting_dims=\{(\d+)\}", text)
    assert len(dots) == 3
    for operand, summed in dots:
        assert layouts[operand].split(",")[0] == summed, operand


# Groups of rows, each times its expert's matrix: the forms by copies and in turn, and the plain one


COPIES, IN_TURN = 3, 1
"""Rows of a group for which a 5 x 2 matrix is copied (10 <= 3 * 7), and for which it is not (10 > 1 * 7)."""


@functools.lru_cache
def compiled(function: Callable[..., jax.Array], further: bool):
    def run(rows, weights, further_expert, cotangent):
        index = further_expert if further else None
        y, pull = jax.vjp(lambda r, w: function(r, w, index), rows, weights)
        return y, *pull(cotangent)

    return jax.jit(run)


@pytest.mark.parametrize("count", [COPIES, IN_TURN])
def test_the_product_has_the_dtype_of_the_rows(count: int) -> None:
    """bfloat16 rows, float32 weights: a bfloat16 product, and a float32 gradient for the weights."""
    rows, weights = jnp.ones((4, count, 5), jnp.bfloat16), jnp.ones((3, 5, 2), jnp.float32)
    y, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, jnp.array([1])), rows, weights)
    d_rows, d_weights = pull(y)
    assert (y.dtype, d_rows.dtype, d_weights.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_no_group_is_multiplied_in_tf32() -> None:
    """Forward and backward, in the forms of all devices: tracing sees the branches that only a card takes."""
    rows, weights = jnp.ones((5, 4, 3)), jnp.ones((2, 3, 6))

    def loss(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return grouped_matmul(rows, weights, jnp.array([0, 1, 1])).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(rows, weights))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 5
