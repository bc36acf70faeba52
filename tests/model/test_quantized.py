"""Matrices of 8 and 4 bits: how codes are stored, every form of their product, and rounding the weights of a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model import quantized as module
from moe_jax.model.kernels import quantized as kernels
from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from moe_jax.model.kernels.quantized import quantized_matmul, vector_product
from moe_jax.model.quantized import WEIGHTS, QuantizedMatrix, Weights, group_size, packed, quantize, quantized_shapes
from moe_jax.model.transformer import Params
from moe_jax.runs.arrays import named_leaves
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
    np.testing.assert_array_equal(matrix.dequantized("float32").reshape(-1), [0.5, -1, 1.5, -3.5])
    assert float(quantized_matmul(jnp.asarray([[1.0, 2, 4, 8]]), matrix)[0, 0]) == -23.5


@functools.lru_cache
def compiled(dtype: str | None = None):
    return jax.jit(lambda x, matrix: quantized_matmul(x, matrix, dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("count", "inputs", "many"), [(1, 64, 4), (1, 64, 5), (3, 6, 4), (3, 6, 5), (kernels.FEW_ROWS + 1, 64, 5)]
)
def test_products_of_few_and_of_many_rows(
    bits: int, many: int, count: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with groups of 2 inputs, which 6 inputs have, with more than one group, and with five outputs as many."""
    monkeypatch.setattr(kernels, "MANY", many)
    matrix, values = random_matrix(bits, inputs, 5)
    x = rows(count, inputs)
    y = jax.jit(lambda x, matrix: quantized_matmul(x, matrix))(x, matrix)
    assert tiny.relative_error(y, x @ values) < 2e-6


@pytest.mark.parametrize("bits", BITS)
def test_activations_in_bfloat16_are_summed_in_float32(bits: int) -> None:
    """The sum of 64 terms is off by less than the rounding of its terms would allow in bfloat16, 2^-8 each."""
    matrix, values = random_matrix(bits, 64, 5)
    x = jnp.asarray(rows(1, 64), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ values
    assert tiny.relative_error(compiled("float32")(x, matrix), exact) < 1e-6
    assert compiled()(x, matrix).dtype == jnp.bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_products_with_the_matrices_of_experts(bits: int) -> None:
    """All experts, each with its own rows; one row with the expert of an index; and several such rows."""
    matrix, values = random_matrix(bits, 3, 64, 5)
    x = rows(3, 2, 64)
    assert tiny.relative_error(jax.jit(quantized_matmul)(x, matrix), np.einsum("gnd,gdf->gnf", x, values)) < 1e-6
    one = jax.jit(vector_product)
    for expert in range(3):
        y = one(x[0, 0], matrix, jnp.int32(expert))
        assert tiny.relative_error(y, x[0, 0] @ values[expert]) < 1e-6
    chosen = np.array([2, 0, 2, 1])  # of rows that differ
    several = jax.jit(kernels.quantized_vectors_matmul)(rows(4, 64), matrix, jnp.asarray(chosen))
    assert tiny.relative_error(several, np.einsum("kd,kdf->kf", rows(4, 64), values[chosen])) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_rows(bits: int) -> None:
    """One expert, as a dense network has; and further groups, whose experts have an index."""
    matrix, values = random_matrix(bits, 2, 64, 5)
    x = rows(3, 2, 64)
    first = jax.tree.map(lambda part: part[:1], matrix)
    assert tiny.relative_error(jax.jit(grouped_matmul)(x[:1], first), x[:1] @ values[:1]) < 1e-6
    y = jax.jit(grouped_matmul)(x, matrix, jnp.array([1]))
    assert tiny.relative_error(y, x @ values[[0, 1, 1]]) < 1e-6


def test_codes_in_tiles_stand_for_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles of four outputs, and eight groups, two in each stream: the matrix, its columns, and every form of its
    product. Matrices that do not fall into tiles stay as they are."""
    monkeypatch.setattr(module, "TILE", 4)
    plain, values = random_matrix(4, 3, 256, 20)
    others = {"eight": random_matrix(8, 64, 20)[0], "odd": random_matrix(4, 64, 5)[0], "vector": jnp.ones(20)}
    kept = {name: jax.tree.map(np.asarray, other) for name, other in others.items()}
    first = jax.tree.map(lambda part: part[1], plain)
    made = module.in_tiles({"experts": plain, "one": first, **others})
    experts, one = made.pop("experts"), made.pop("one")
    assert experts.tiled
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, made))
    np.testing.assert_allclose(experts.dequantized("float32"), values, rtol=2**-24)
    ids = np.array([[3, 19], [0, 4]])
    np.testing.assert_array_equal(one.columns(jnp.asarray(ids)), values[1].T[ids].astype(np.float32))
    for count in (1, 3, kernels.FEW_ROWS + 1):
        assert tiny.relative_error(compiled()(rows(count, 256), one), rows(count, 256) @ values[1]) < 1e-6
    chosen = np.array([2, 0, 2])
    several = jax.jit(kernels.quantized_vectors_matmul)(rows(3, 256), experts, jnp.asarray(chosen))
    assert tiny.relative_error(several, np.einsum("kd,kdf->kf", rows(3, 256), values[chosen])) < 1e-6
    x = rows(3, 7, 256)
    assert tiny.relative_error(jax.jit(grouped_matmul)(x, experts), np.einsum("gnd,gdf->gnf", x, values)) < 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("expert", [False, True])
def test_a_product_of_one_row_writes_no_converted_matrix(bits: int, expert: bool) -> None:
    """Its temporary arrays, the sums of the groups included, are smaller than the codes. Beside the index of an expert
    there is also a copy of its codes."""
    matrix, _ = random_matrix(bits, *([2] if expert else []), 64, 96)
    matrix = jax.tree.map(lambda part: jnp.tile(part, 4), matrix)
    x = rows(64)
    if expert:
        program = jax.jit(vector_product).lower(x, matrix, jnp.int32(0))
    else:
        program = jax.jit(quantized_matmul).lower(x[None], matrix)
    codes = matrix.codes.nbytes // (2 if expert else 1)
    assert program.compile().memory_analysis().temp_size_in_bytes < (2 if expert else 1) * codes


# Rounding: against NumPy, at its edges, and through the whole model


LARGEST = {"int8": 127, "int4": 7}
CASES = {
    "tied": {"layers": 1, "width": 64, "tied_head": True},
    "untied": {
        "layers": 1,
        "tied_head": False,
        "shared_experts": 1,
        "shared_gate": True,
        "activation": "gelu",
        "bias": True,
        "norm": "layernorm",
    },
}


def rounded(matrix: np.ndarray, weights: Weights) -> tuple[QuantizedMatrix, np.ndarray]:
    """The quantised matrix, and the scale of each entry in float64."""
    found = quantize({"head": jnp.asarray(matrix)}, weights)["head"]
    scale = np.asarray(found.scale, np.float64)
    return found, np.repeat(scale, matrix.shape[0] // len(scale), axis=0)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["normal", "one outlier", "tiny", "huge"])
def test_every_entry_is_the_nearest_code(weights: Weights, kind: str) -> None:
    """An entry is off by at most half a scale. The scale is what the definition says, in its dtype."""
    matrix = np.random.default_rng(0).normal(size=(96, 7)).astype(np.float32)
    matrix *= {"tiny": 1e-30, "huge": 1e35}.get(kind, 1)
    if kind == "one outlier":
        matrix[40, 3] = 1e6
    found, scale = rounded(matrix, weights)
    size = 96 if weights == "int8" else 32
    expected = np.abs(matrix.reshape(-1, size, 7)).max(1) / np.float32(LARGEST[weights])
    assert found.scale.dtype == (jnp.float32 if weights == "int8" else jnp.bfloat16)
    expected = expected.astype(found.scale.dtype)
    assert tiny.relative_error(found.scale, expected) <= (2**-8 if weights == "int4" else 2**-22)
    values = np.asarray(found.dequantized("float32"), np.float64)
    np.testing.assert_array_less(np.abs(values - matrix), 0.5001 * scale)
    codes = np.rint(values / scale)
    np.testing.assert_array_equal(codes, np.rint(matrix / scale).clip(-LARGEST[weights], LARGEST[weights]))
    if kind == "one outlier":  # the other columns, and in int4 the other groups, keep their own scales
        assert np.abs(values - matrix)[:, :3].max() < 0.5
        assert weights == "int8" or np.abs(values - matrix)[64:, 3].max() < 0.5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_zeros_stay_zeros(weights: Weights) -> None:
    matrix = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    matrix[:, 1] = 0
    found, scale = rounded(matrix, weights)
    assert not np.asarray(found.dequantized("float32"))[:, 1].any()
    assert not scale[:, 1].any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", [32, 128, 2048])
def test_one_value_that_is_not_finite_shows_in_one_scale(weights: Weights, inputs: int) -> None:
    """Wherever it is: the maximum of a CPU leaves a NaN out at some places."""
    rng = np.random.default_rng(inputs)
    for value in (np.nan, np.inf, -np.inf):
        for row in (0, 1, 7, inputs - 2, inputs - 1, *rng.integers(0, inputs, 4).tolist()):
            matrix = rng.normal(size=(inputs, 5)).astype(np.float32)
            matrix[row, 3] = value
            bad = ~np.isfinite(np.asarray(rounded(matrix, weights)[0].scale, np.float32))
            group = row // group_size(inputs) if weights == "int4" else 0
            assert np.argwhere(bad).tolist() == [[group, 3]]


def test_the_nearest_code_of_a_half_is_even() -> None:
    """-127, 2.5 and 3.5 times the scale 1: a half goes to the even code, as IEEE 754 rounds (section 4.3.1)."""
    matrix = np.array([[-127.0], [2.5], [3.5], [-0.5]], np.float32)
    assert np.asarray(rounded(matrix, "int8")[0].codes)[:, 0].tolist() == [-127, 2, 4, 0]


def test_an_odd_number_of_inputs_is_refused_in_int4() -> None:
    with pytest.raises(UserError, match="head: has 5 inputs, and int4 packs two into a byte; take int8"):
        quantize({"head": jnp.ones((5, 4))}, "int4")


@functools.lru_cache
def models(case: str, weights: Weights) -> tuple[Any, Params, Params]:
    """(definition, quantised parameters, the same weights in float32)."""
    graphdef, params = tiny.build(tiny.config(**CASES[case]))
    quantised = quantize(params, weights)
    plain = module.dequantize(quantised, jax.eval_shape(lambda: params))
    return graphdef, quantised, plain


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_rounded_and_what_is_not(weights: Weights) -> None:
    _, params = tiny.build(tiny.config(**CASES["untied"]))
    _, quantised, _ = models("untied", weights)
    before, after = named_leaves(params), named_leaves(quantised)
    matrices = {name.removesuffix(".codes") for name in after if name.endswith(".codes")}
    assert all(after[name] is before[name] for name in before.keys() - matrices)
    layer = [f"attention.{n}" for n in ("out", "qkv")]
    layer += [f"ffn.{part}.{n}" for part in ("experts", "shared") for n in ("w_in", "w_out")]
    assert matrices == {"embedding", "head", *(f"blocks.0.{n}" for n in layer)}
    shapes = quantized_shapes(jax.eval_shape(lambda: params), weights)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), quantised)


@pytest.mark.parametrize(
    ("case", "weights"), [("tied", "int4"), pytest.param("untied", "int8", marks=pytest.mark.slow)]
)
def test_the_model_computes_with_the_rounded_weights(case: str, weights: Weights) -> None:
    """Prefill, and greedy decoding with a cache, as with the same weights in float32."""
    graphdef, quantised, plain = models(case, weights)
    decoder = Decoder(graphdef, tiny.T, tiny.V)
    padded = np.zeros((1, tiny.T), np.int32)
    logits = [decoder.prefill(params, padded, np.int32(3)).logits for params in (quantised, plain)]
    assert tiny.relative_error(*logits) < 1e-5
    texts = [
        list(decoder.stream(params, [0, 0], settings=Sampling(0.0), key=jax.random.key(0), stop=-1, limit=6))
        for params in (quantised, plain)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.01), ("int4", 0.15)])
@pytest.mark.parametrize("case", CASES)
def test_dequantised_has_the_shapes_and_nearly_the_values_of_the_model(
    case: str, weights: Weights, most: float
) -> None:
    _, params = tiny.build(tiny.config(**CASES[case]))
    back = module.dequantize(module.in_tiles(quantize(params, weights)), jax.eval_shape(lambda: params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), back) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    for name, values in named_leaves(params).items():
        assert not np.any(values) or tiny.relative_error(named_leaves(back)[name], values) < most, name


@pytest.mark.parametrize("bits", BITS)
def test_a_wide_matrix_by_columns(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 columns of 10, of 6 inputs: the last block begins at column 6 and overlaps the one before."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    matrix, values = random_matrix(bits, 6, 10)
    x = rows(kernels.FEW_ROWS + 1, 6)
    y = jax.jit(lambda x, matrix: quantized_matmul(x, matrix))(x, matrix)
    assert tiny.relative_error(y, x @ values) < 1e-6
