"""Norms, rotary positions, dropout and the precision policy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
from tests.support import oracles


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
