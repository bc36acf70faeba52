"""The matrix product with a gradient of its own, against NumPy in float64, and how it lies in memory."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.model.kernels.matmul import _row_matmul, matmul, matmul_wide, transpose_contiguous, vector_matmul
from moe_jax.model.kernels.row_sum import part_at, row_at, row_sum

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


def test_float64_weights_get_a_float64_gradient(float64: None) -> None:
    x, weights = drawn(SHAPES["plain"], np.float64)
    y, pull = jax.vjp(matmul, jnp.asarray(x), jnp.asarray(weights))
    cotangent = np.random.default_rng(1).normal(size=y.shape)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[1], x.T @ cotangent, atol=1e-13)


@pytest.mark.parametrize("width", [48, 21])
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 2**-8)])
def test_vector_matmul_against_numpy(width: int, dtype: type, rounding: float) -> None:
    """A width that is a multiple of `row_sum.ROWS`, and one that is not."""
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
    assert temporary(matmul, jnp.zeros((1, 512), jnp.bfloat16), weights[0]) <= few_rows


def test_transpose_contiguous() -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(jax.jit(transpose_contiguous)(x), x.swapaxes(1, 2))


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


# Sums of rows


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 48])
def test_each_row_is_added_once(rows: int) -> None:
    """The term of row i is 1 at place i and 0 elsewhere, so that the sum counts how often each row was added."""
    total = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, rows)), jnp.float32)
    found = jax.jit(lambda total: row_sum(lambda i: jax.nn.one_hot(i, rows), rows, total))(total)
    np.testing.assert_array_equal(found, total + 1)


def test_a_row_of_an_index(float64: None) -> None:
    """With indices of both types, as loops and routers have them."""
    matrix = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    at = jax.jit(lambda matrix, expert, i: row_at(matrix, expert, i))
    for expert in range(2):
        for i in range(3):
            np.testing.assert_array_equal(at(matrix, jnp.int32(expert), i), matrix[expert, i])
    np.testing.assert_array_equal(row_at(jnp.asarray(matrix), jnp.int32(1)), matrix[1])
    part = jax.jit(lambda matrix, i: part_at(matrix, jnp.int32(1), i, jnp.int32(2), sizes=(2,)))
    np.testing.assert_array_equal(part(matrix, 1), matrix[1, 1, 2:])
