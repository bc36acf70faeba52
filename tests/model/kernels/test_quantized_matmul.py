"""Matrices of 8 and 4 bits: how codes are stored, and every form of their product against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import quantized as module
from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from moe_jax.model.kernels.matmul import matmul, vector_matmul
from moe_jax.model.quantized import QuantizedMatrix, group_size, packed, quantized_matmul
from tests.support import tiny

BITS = (8, 4)


def random_matrix(bits: int, *shape: int, seed: int = 0) -> tuple[QuantizedMatrix, np.ndarray]:
    """Random codes and scales, and the float64 matrix that they stand for, made entry by entry."""
    rng = np.random.default_rng(seed)
    *experts, inputs, outputs = shape
    size = group_size(inputs) if bits == 4 else inputs
    largest = 7 if bits == 4 else 127
    codes = rng.integers(-largest, largest + 1, shape).astype(np.int8)
    scale = jnp.asarray(rng.random((*experts, inputs // size, outputs)), jnp.bfloat16 if bits == 4 else jnp.float32)
    wide = np.asarray(scale, np.float64)
    values = np.empty(shape)
    for index in np.ndindex(*shape):
        *expert, i, o = index
        values[index] = codes[index] * wide[(*expert, i // size, o)]
    if bits == 8:
        return QuantizedMatrix(jnp.asarray(codes), scale), values
    stored = np.zeros((*experts, inputs // 2, outputs), np.uint8)
    for index in np.ndindex(*shape):
        *expert, i, o = index
        group, place = divmod(i, size)
        byte = (*expert, group * size // 2 + place % (size // 2), o)
        stored[byte] |= np.uint8((int(codes[index]) + 8) << (4 if place >= size // 2 else 0))
    return QuantizedMatrix(jnp.asarray(stored), scale), values


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_four_inputs_by_hand() -> None:
    """Codes 1, -2, 3, -7 are stored as 9, 6, 11, 1. Byte 0 holds inputs 0 and 2: 9 + 16 x 11 = 185. Byte 1 holds inputs
    1 and 3: 6 + 16 x 1 = 22. With the scale 0.5 and x = 1, 2, 4, 8 the product is 0.5 (1 - 4 + 12 - 56) = -23.5."""
    codes = jnp.asarray([1, -2, 3, -7], jnp.int8).reshape(1, 4, 1)
    np.testing.assert_array_equal(packed(codes).reshape(-1), [185, 22])
    matrix = QuantizedMatrix(packed(codes).reshape(2, 1), jnp.full((1, 1), 0.5, jnp.bfloat16))
    assert (matrix.bits, matrix.shape, matrix.ndim) == (4, (4, 1), 2)
    np.testing.assert_array_equal(matrix.astype("float32").reshape(-1), [0.5, -1, 1.5, -3.5])
    assert float(quantized_matmul(jnp.asarray([[1.0, 2, 4, 8]]), matrix)[0, 0]) == -23.5


@pytest.mark.parametrize("bits", BITS)
def test_the_matrix_that_codes_stand_for(bits: int) -> None:
    matrix, values = random_matrix(bits, 2, 64, 3)
    assert matrix.shape == values.shape
    found = np.asarray(matrix.astype("float32"), np.float64)
    np.testing.assert_allclose(found, values, rtol=2**-24)  # one rounding


@functools.lru_cache
def compiled(dtype: str | None = None):
    return jax.jit(lambda x, matrix: quantized_matmul(x, matrix, dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("count", "inputs", "many"), [(1, 64, 4), (1, 64, 5), (3, 6, 4), (3, 6, 5), (module.FEW_ROWS + 1, 64, 5)]
)
def test_products_of_few_and_of_many_rows(
    bits: int, many: int, count: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with groups of 2 inputs, which 6 inputs have, with more than one group, and with five outputs as many."""
    monkeypatch.setattr(module, "MANY", many)
    matrix, values = random_matrix(bits, inputs, 5)
    x = rows(count, inputs)
    y = jax.jit(lambda x, matrix: quantized_matmul(x, matrix))(x, matrix)
    assert tiny.relative_error(y, x @ values) < 2e-6


def test_an_odd_number_of_inputs_in_int8() -> None:
    matrix, values = random_matrix(8, 5, 4)
    x = rows(2, 5)
    assert tiny.relative_error(compiled()(x, matrix), x @ values) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_activations_in_bfloat16_are_summed_in_float32(bits: int) -> None:
    """The sum of 64 terms is off by less than the rounding of its terms would allow in bfloat16, 2^-8 each."""
    matrix, values = random_matrix(bits, 64, 5)
    x = jnp.asarray(rows(1, 64), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ values
    assert tiny.relative_error(compiled("float32")(x, matrix), exact) < 1e-6
    assert compiled()(x, matrix).dtype == jnp.bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_a_wide_matrix_by_columns(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 columns of 10: the last block begins at column 6 and overlaps the one before."""
    monkeypatch.setattr(module, "BLOCK", 4)
    matrix, values = random_matrix(bits, 64, 10)
    x = rows(module.FEW_ROWS + 1, 64)
    y = jax.jit(lambda x, matrix: quantized_matmul(x, matrix))(x, matrix)
    assert tiny.relative_error(y, x @ values) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_products_with_the_matrices_of_experts(bits: int) -> None:
    """All experts, each with its own rows; and one row with the expert of an index."""
    matrix, values = random_matrix(bits, 3, 64, 5)
    x = rows(3, 2, 64)
    assert tiny.relative_error(jax.jit(matmul)(x, matrix), np.einsum("gnd,gdf->gnf", x, values)) < 1e-6
    one = jax.jit(vector_matmul)
    for expert in range(3):
        y = one(x[0, 0], matrix, jnp.int32(expert))
        assert tiny.relative_error(y, x[0, 0] @ values[expert]) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_rows(bits: int) -> None:
    """One expert, as a dense network has; and further groups, whose experts have an index."""
    matrix, values = random_matrix(bits, 2, 64, 5)
    x = rows(3, 2, 64)
    first = jax.tree.map(lambda part: part[:1], matrix)
    assert tiny.relative_error(jax.jit(grouped_matmul)(x[:1], first), x[:1] @ values[:1]) < 1e-6
    y = jax.jit(grouped_matmul)(x, matrix, jnp.array([1]))
    assert tiny.relative_error(y, x @ values[[0, 1, 1]]) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_columns_are_rows_of_an_embedding(bits: int) -> None:
    matrix, values = random_matrix(bits, 64, 10)
    ids = np.array([[3, 9], [0, 3]])
    np.testing.assert_array_equal(matrix.columns(jnp.asarray(ids)), values.T[ids].astype(np.float32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("expert", [False, True])
def test_a_product_of_one_row_writes_no_converted_matrix(bits: int, expert: bool) -> None:
    """Its temporary arrays, the sums of the groups included, are smaller than the codes. Beside the index of an expert
    there is also a copy of its codes."""
    matrix, _ = random_matrix(bits, *([2] if expert else []), 64, 96)
    matrix = jax.tree.map(lambda part: jnp.tile(part, 4), matrix)
    x = rows(64)
    if expert:
        program = jax.jit(vector_matmul).lower(x, matrix, jnp.int32(0))
    else:
        program = jax.jit(quantized_matmul).lower(x[None], matrix)
    codes = matrix.codes.nbytes // (2 if expert else 1)
    assert program.compile().memory_analysis().temp_size_in_bytes < (2 if expert else 1) * codes


@pytest.mark.parametrize("bits", BITS)
def test_products_in_a_loop_write_no_converted_matrix(bits: int) -> None:
    """Nor does the program before the loop. So a loop that writes eight tokens reads the codes eight times."""
    matrix, _ = random_matrix(bits, 64, 64)
    matrix = jax.tree.map(lambda part: jnp.tile(part, 16), matrix)
    head, _ = random_matrix(bits, 64, 1024)

    def eight(x: jax.Array, matrix: QuantizedMatrix, head: QuantizedMatrix) -> jax.Array:
        def token(_: object, x: jax.Array) -> jax.Array:
            return quantized_matmul(x, head)[:, :64] + quantized_matmul(x, matrix)[:, :64]

        return jax.lax.fori_loop(0, 8, token, x)

    program = jax.jit(eight).lower(rows(1, 64), matrix, head).compile()
    assert program.memory_analysis().temp_size_in_bytes < head.codes.nbytes + matrix.codes.nbytes
