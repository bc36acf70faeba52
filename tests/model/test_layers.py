"""Norms, rotary positions, dropout, initial values, and rows of a table with both forms of their gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import ExecutionConfig, RunConfig
from moe_jax.model.kernels import embedding_lookup as lookup
from moe_jax.model.kernels.embedding_lookup import embedding_lookup
from moe_jax.model.layers import (
    Normalisation,
    apply_rope,
    dropout,
    embedding_init,
    keep_mask,
    matrix_init,
)
from moe_jax.model.precision import at_least_float32
from moe_jax.planning.device_memory import for_described_gpu
from moe_jax.planning.target import load_target
from moe_jax.training.programs import Programs
from tests.support import oracles, tiny
from tests.support.programs import scatter_adds_of_floats


def normalisation(kind: str, scale: np.ndarray, bias: np.ndarray | None) -> Normalisation:
    norm = Normalisation(kind, len(scale), bias is not None)
    norm.scale = nnx.Param(jnp.asarray(scale))
    if bias is not None and kind == "layernorm":
        norm.bias = nnx.Param(jnp.asarray(bias))
    return norm


def test_norms_against_loops(float64: None) -> None:
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(size=(3, 6)) * [[1e-3], [1], [1e3]] + 2, rng.normal(size=6), rng.normal(size=6)
    expected = [oracles.layer_norm(row, scale, bias) for row in x]
    np.testing.assert_allclose(normalisation("layernorm", scale, bias)(jnp.asarray(x)), expected, atol=1e-11)
    without = [oracles.layer_norm(row, scale, np.zeros(6)) for row in x]
    np.testing.assert_allclose(normalisation("layernorm", scale, None)(jnp.asarray(x)), without, atol=1e-11)
    expected = [oracles.rms_norm(row, scale) for row in x]
    np.testing.assert_allclose(normalisation("rmsnorm", scale, None)(jnp.asarray(x)), expected, atol=1e-12)


@pytest.mark.parametrize(("kind", "oracle"), [("layernorm", oracles.layer_norm), ("rmsnorm", oracles.rms_norm)])
def test_norms_with_another_eps(kind: str, oracle: Any, float64: None) -> None:
    x = np.random.default_rng(1).normal(size=(3, 6)) * 0.1
    scale = [np.ones(6), np.zeros(6)][: 1 + (kind == "layernorm")]
    expected = [oracle(row, *scale, eps=0.25) for row in x]
    np.testing.assert_allclose(Normalisation(kind, 6, False, 0.25)(jnp.asarray(x)), expected, atol=1e-13)


def test_rmsnorm_has_no_bias() -> None:
    assert not hasattr(Normalisation("rmsnorm", 4, True), "bias")


def test_norm_statistics_are_float32_in_bfloat16() -> None:
    """The mean square of 2,048 ones and one 256: bfloat16 sums would stall long before, float32 ones are exact."""
    x = jnp.ones(2049, jnp.bfloat16).at[0].set(256)
    y = Normalisation("rmsnorm", 2049, False)(x[None])[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(y[0]), 256 / np.sqrt((65536 + 2048) / 2049), rtol=2**-8)


def test_rotation_against_complex_numbers(float64: None) -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 2, 6))
    positions = np.array([0, 7, 300])
    turned = apply_rope(jnp.asarray(x), jnp.asarray(positions))
    for b, t, h in np.ndindex(2, 3, 2):
        np.testing.assert_allclose(turned[b, t, h], oracles.rotate(x[b, t, h], int(positions[t])), atol=1e-12)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])  # position 0 is not turned
    slower = apply_rope(jnp.asarray(x), jnp.asarray(positions), 1e6)
    np.testing.assert_allclose(slower[1, 2, 0], oracles.rotate(x[1, 2, 0], 300, 1e6), atol=1e-12)


def test_the_gradient_of_a_rotation_is_that_of_complex_numbers(float64: None) -> None:
    """z -> z e^(i t) is linear, so the gradient of the sum of y c is c turned by -t."""
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(2, 2, 5, 3, 8))
    positions = rng.integers(0, 100, (2, 5))
    d_x = jax.grad(lambda x: (apply_rope(x, jnp.asarray(positions)) * c).sum())(jnp.asarray(x))
    angle = positions[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = (c[..., :4] + 1j * c[..., 4:]) * np.exp(-1j * angle)
    np.testing.assert_allclose(d_x, np.concatenate([turned.real, turned.imag], -1), atol=1e-12)


def test_rotated_products_depend_on_the_distance_only(float64: None) -> None:
    q, k = np.random.default_rng(2).normal(size=(2, 8))

    def product(query_at: int, key_at: int) -> float:
        pair = jnp.asarray([q, k])[None, :, None, :]
        turned = apply_rope(pair, jnp.array([query_at, key_at]))
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    assert product(5, 2) == pytest.approx(product(905, 902), abs=1e-10)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3
    assert abs(product(5, 2) - product(2, 5)) > 1e-3


def test_dropout_off() -> None:
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.split(jax.random.key(0), 3)) is x


def one_key(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), 1)


def test_masks_drop_the_named_share_each_entry_by_itself() -> None:
    """90,001 entries, an odd number: a share of 0.3 is known to 0.15 %. The two halves of a word are unrelated."""
    mask = np.asarray(keep_mask(one_key(0), 0.3, (90_001,)))[0]
    assert abs(mask.mean() - 0.7) < 5 * np.sqrt(0.7 * 0.3 / 90_001)
    pairs = mask[:90_000].reshape(-1, 2)
    assert abs(pairs.all(1).mean() - 0.49) < 5 * np.sqrt(0.49 * 0.51 / 45_000)
    assert keep_mask(one_key(0), 0.999999, (90_001,)).sum() < 20
    assert keep_mask(one_key(0), 0.3, (3, 5)).shape == (1, 3, 5)
    assert (mask != np.asarray(keep_mask(one_key(1), 0.3, (90_001,)))[0]).any()


def test_a_mask_is_the_halves_of_random_words_in_order() -> None:
    """The lower 16 bits of a word decide the first entry, the upper 16 the second. A resumed run needs this order."""
    words = np.asarray(jax.random.bits(one_key(0)[0], (3,), jnp.uint32))
    halves = [half for word in words.tolist() for half in (word % 65_536, word // 65_536)]
    for rate in (0.3, 0.999999):
        least = min(round(rate * 65_536), 65_535)
        mask = keep_mask(one_key(0), rate, (5,))
        assert mask.dtype == bool
        assert mask[0].tolist() == [half >= least for half in halves[:5]]


def test_looking_up_has_the_gradient_of_indexing(float64: None) -> None:
    """Rows that are looked up twice get both gradients, rows that are not get exactly 0."""
    rng = np.random.default_rng(0)
    table, ids = jnp.asarray(rng.normal(size=(5, 3))), jnp.array([[4, 1, 4], [0, 1, 1]])
    d_rows = rng.normal(size=(2, 3, 3))
    rows, pull = jax.vjp(lambda t: embedding_lookup(t, ids), table)
    expected = np.zeros((5, 3))
    for index, d in zip(np.asarray(ids).ravel(), d_rows.reshape(-1, 3), strict=True):
        expected[index] += d
    assert (np.asarray(rows) == np.asarray(table)[np.asarray(ids)]).all()
    np.testing.assert_allclose(pull(jnp.asarray(d_rows))[0], expected, atol=1e-15)
    assert (expected[[2, 3]] == 0).all()


def test_initial_values() -> None:
    rngs = nnx.Rngs(params=jax.random.key(0))
    matrix = np.asarray(matrix_init(rngs, (3, 100, 50), scale=2.0))
    # 15,000 numbers: the standard deviation is known to 0.6 %.
    np.testing.assert_allclose(matrix.std(), 2 / np.sqrt(100), rtol=0.03)
    # Rows of length 1: 300 of them, each of 50 numbers of variance 1/50.
    np.testing.assert_allclose(np.asarray(embedding_init(rngs, (300, 50))).std(), 1 / np.sqrt(50), rtol=0.03)
    assert (np.asarray(matrix_init(rngs, (100, 50)))[:50] != matrix[0, :50]).any()


def test_wide_dtypes() -> None:
    assert [str(at_least_float32(d)) for d in ("bfloat16", "float16", "float32")] == ["float32"] * 3
    with jax.enable_x64(True):
        assert at_least_float32("float64") == "float64"


# Rows of a table, and both forms of their gradient, against sums in float64


RNG = np.random.default_rng(3)
CASES = {
    "one copy": ([2], 4),
    "two copies": ([2, 2], 4),
    "one id, whose copies fill many blocks": ([1] * 100, 4),
    "an id that begins in the middle of a block and fills others": ([0] * 5 + [1] * 50 + [2] * 45, 3),
    "ids that end with their blocks": ([n // 8 for n in range(512)], 64),
    "each id once": (RNG.permutation(512).tolist(), 512),
    "most ids are never looked up": (RNG.choice([0, 7, 999], 200).tolist(), 1000),
    "few frequent ids, many seldom ones": (((RNG.zipf(1.3, 1000) - 1) % 300).tolist(), 300),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_sums_by_id_against_float64(case: str, dtype: str) -> None:
    """An error of at most 2^-23 of the sum of magnitudes for each of the additions in a row. Ids without a copy get
    exactly 0, and a second run gives the same bits."""
    ids, entries = CASES[case]
    rows = jnp.asarray(np.random.default_rng(4).normal(size=(len(ids), 3)), dtype)
    run = jax.jit(lookup.sum_by_id, static_argnums=2)
    found, again = run(jnp.asarray(ids), rows, entries), run(jnp.asarray(ids), rows, entries)
    tiny.assert_same_bits(found, again)
    assert found.dtype == jnp.float32
    exact, magnitude = np.zeros((2, entries, 3))
    np.add.at(exact, ids, np.asarray(rows, np.float64))
    np.add.at(magnitude, ids, np.abs(np.asarray(rows, np.float64)))
    additions = lookup._block_size(len(ids)) + len(ids) // lookup._block_size(len(ids)) + 1
    assert (np.abs(np.asarray(found, np.float64) - exact) <= additions * 2.0**-23 * magnitude).all()
    assert (np.asarray(found)[np.setdiff1d(range(entries), ids)] == 0).all()


def test_a_nan_stays_with_its_id() -> None:
    ids, rows = jnp.array([3, 0, 1, 3, 1, 0, 2]), np.ones((7, 2), np.float32)
    rows[4] = np.nan
    found = np.asarray(lookup.sum_by_id(ids, jnp.asarray(rows), 5))
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2, 3, 4], 0], [2, 1, 2, 0])


@pytest.mark.parametrize(("platform", "scatters"), [("cuda", 0), ("tpu", 0), ("cpu", 1)])
def test_only_a_cpu_gets_a_scatter_add(platform: str, scatters: int) -> None:
    table, ids = jax.ShapeDtypeStruct((50, 4), jnp.float32), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    rows = jax.ShapeDtypeStruct((2, 8, 4), jnp.float32)

    def gradient(table, ids, d_rows):
        return jax.vjp(lambda t: lookup.embedding_lookup(t, ids), table)[1](d_rows)

    with for_described_gpu():
        text = jax.jit(gradient).trace(table, ids, rows).lower(lowering_platforms=(platform,)).as_text()
    assert len(scatter_adds_of_floats(text)) == scatters


@pytest.mark.parametrize("gpu", ["rtx3050-4gb", "quadro-t1000-4gb"])
@pytest.mark.parametrize("dispatch", ["capacity", "blocks"])
@pytest.mark.parametrize("model", [{"positions": "rope"}, {"positions": "learned", "tied_head": False}], ids=str)
def test_a_training_step_of_a_gpu_has_no_scatter_add(model: dict, dispatch: str, gpu: str) -> None:
    """In no part of it: such sums have no fixed order there."""
    config = RunConfig(model=tiny.config(dispatch=dispatch, **model), execution=ExecutionConfig(remat=True))
    programs = Programs.of(config, load_target(gpu))
    with for_described_gpu():
        traced = programs.step.trace(programs.state_shapes, programs.batch_shapes(2, 1))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.scatter" in text, "integers are scattered to distinct places"
    assert scatter_adds_of_floats(text) == []


@pytest.mark.parametrize(("count", "size"), [(1, 1), (4, 2), (2048, 16), (8192, 32), (65_536, 64)])
def test_blocks_have_about_the_cube_root_of_twice_the_copies(count: int, size: int) -> None:
    assert lookup._block_size(count) == size
