"""Cross-entropy by blocks of tokens equals all logits at once, with gradients, and never holds all logits."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.certify.hlo import parse
from moe_jax.model.kernels import cross_entropy
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy
from tests.support import plain_kernels

TOKENS, WIDTH, VOCABULARY = 30, 6, 17


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 5 tokens a block: 30 tokens are 6 blocks."""
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 5 * VOCABULARY * 4)


def operands(dtype: str = "float64") -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(WIDTH, VOCABULARY))
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(rng.integers(0, VOCABULARY, TOKENS))


def with_gradients(function, hidden, head, targets, cotangent):
    loss, pull = jax.vjp(lambda h, w: function(h, w, targets), hidden, head)
    return loss, *pull(cotangent)


def test_logsumexp_in_one_pass(float64: None) -> None:
    """exp of the largest logits overflows in every precision. Columns of padding, with -inf, count as 0."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, 301)) * 300
    z[1] += 1e5
    z[2] -= 1e5
    z[3, 1:] = -np.inf
    z[4, :3] = -np.inf
    z[:, -45:] = -np.inf
    most = z.max(1)
    expected = most + np.log(np.exp(z - most[:, None]).sum(1))
    np.testing.assert_allclose(jax.jit(cross_entropy._logsumexp_in_one_pass)(z), expected, rtol=1e-14)
    assert cross_entropy._logsumexp_in_one_pass(jnp.array([[4.0, -jnp.inf]])).tolist() == [4]
    assert jnp.isnan(cross_entropy._logsumexp_in_one_pass(jnp.array([[4.0, jnp.nan, 5.0]]))).all()
    assert not jnp.isfinite(cross_entropy._logsumexp_in_one_pass(jnp.array([[4.0, jnp.inf, 5.0]]))).any()


def test_the_blocks_of_a_gpu_for_gpt_2s_vocabulary() -> None:
    """50,257 columns are filled up to 393 x 128 = 50,304. 2^27 bytes are 667 tokens; 8,192 tokens are 16 times 512."""
    form = cross_entropy.GPU_FORM
    assert form == (128, True)
    assert cross_entropy._padded_head(jnp.zeros((1, 50257)), jnp.dtype("bfloat16"), form).shape == (1, 50304)
    assert cross_entropy.token_blocks(8192, 50304) == (16, 512)


def test_blocks_by_hand(small_blocks: None) -> None:
    """With room for 5 tokens, 6 need 2 blocks, of 3 each. Of a prime number, the last block is filled up. A block has a
    token at least, however large the vocabulary."""
    found = [cross_entropy.token_blocks(n, VOCABULARY) for n in (1, 4, 5, 6, 10, 11, 12, 23)]
    assert found == [(1, 1), (1, 4), (1, 5), (2, 3), (2, 5), (3, 4), (3, 4), (5, 5)]
    assert cross_entropy.token_blocks(7, 100) == (7, 1)


def test_narrow_activations_keep_a_wide_loss_and_the_dtypes_of_their_gradients(small_blocks: None) -> None:
    hidden, head, targets = operands("float32")
    loss, d_hidden, d_head = with_gradients(
        mean_cross_entropy, hidden.astype(jnp.bfloat16), head, targets, jnp.float32(1)
    )
    assert (loss.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = with_gradients(plain_kernels.mean_cross_entropy, hidden, head, targets, jnp.float32(1))
    for one, other in zip((loss, d_hidden, d_head), exact, strict=True):
        error = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
        assert error < 4 * 2**-8


def test_no_buffer_holds_all_logits(small_blocks: None) -> None:
    """Of the compiled program of loss and gradients: no array has N x V entries. The plain form has one."""
    arguments = (*operands("float32"), jnp.float32(1))

    def largest(function: Any) -> int:
        compiled = jax.jit(with_gradients, static_argnums=0).lower(function, *arguments).compile()
        computations, _ = parse(compiled.as_text())
        return max(math.prod(shape) for c in computations.values() for i in c.values() for _, shape in i.arrays)

    assert largest(plain_kernels.mean_cross_entropy) >= TOKENS * VOCABULARY
    assert largest(mean_cross_entropy) < TOKENS * VOCABULARY


@pytest.mark.parametrize("counted", [False, True], ids=["all targets", "some targets"])
def test_a_tied_head_learns_in_bfloat16(counted: bool) -> None:
    """The gradient of the head is transposed into that of the embedding. XLA made one product of both, which no CPU can
    run in bfloat16."""
    rng = np.random.default_rng(3)
    hidden, table = (
        jnp.asarray(rng.normal(size=(64, 32)), "bfloat16"),
        jnp.asarray(rng.normal(size=(260, 32)), "float32"),
    )
    targets = jnp.asarray(rng.integers(0, 260, 64))
    weights = jnp.asarray(rng.integers(0, 2, 64) / 32, "float32") if counted else None

    def gradients(function: Any, hidden: jax.Array):
        def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
            return function(hidden, table.T, targets, weights=weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, table)

    plain = gradients(plain_kernels.mean_cross_entropy, hidden.astype("float32"))
    for ours, expected in zip(gradients(mean_cross_entropy, hidden), plain, strict=True):
        assert np.isfinite(np.asarray(ours, "float32")).all()
        np.testing.assert_allclose(np.asarray(ours, "float32"), expected, atol=2e-2 * np.abs(expected).max())


def zero_columns(dtype: str, scale: float) -> float:
    """The share of the head's columns whose gradient is exactly 0, for 64 tokens with logits of deviation 16."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(64, 256)), dtype)
    head = jnp.asarray(rng.normal(size=(256, 1000)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 1000, 64))
    factor = jnp.float32(scale)

    def scaled(head):
        return factor * mean_cross_entropy(hidden, head, targets, loss_scale=factor)

    gradient = np.asarray(jax.jit(jax.grad(scaled))(head))
    assert np.isfinite(gradient).all()
    return float((gradient == 0).all(0).mean())


def test_the_loss_scale_reaches_the_gradient_of_the_logits_before_float16() -> None:
    """Peaked logits: many probabilities are below 6e-8, the smallest float16. Rounded unscaled, their columns get no
    gradient at any scale. Scaled first, a larger scale saves more of them, and bfloat16 has the range without a scale.
    """
    shares = [zero_columns("float16", 2.0**power) for power in (0, 10, 15, 20)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.4
    assert shares[3] < 0.02
    assert zero_columns("bfloat16", 1.0) == 0
