"""Cross-entropy by blocks of tokens, and its hand-written gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.kernels import cross_entropy
from tests.support import oracles

N, D, V = 12, 3, 5


def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(N, D))),
        jnp.asarray(rng.normal(size=(D, V))),
        jnp.asarray(rng.integers(0, V, N)),
    )


def plain(hidden, head, targets):
    z = hidden @ head
    return (jnp.log(jnp.exp(z).sum(-1)) - z[jnp.arange(N), targets]).mean()


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_mean_cross_entropy_and_its_gradient(blocks: int, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", N // blocks * V * 4)
    assert cross_entropy._blocks(N, V, cross_entropy.cpu_form()) == (blocks, N // blocks)
    hidden, head, targets = operands()
    nats = oracles.cross_entropy(np.asarray(hidden), np.asarray(head), np.asarray(targets))
    # The loss is multiplied by 3 afterwards, so that a gradient that ignores its cotangent shows.
    ours = jax.jit(jax.value_and_grad(lambda h, w: 3 * cross_entropy.mean_cross_entropy(h, w, targets), (0, 1)))
    expected = jax.value_and_grad(lambda h, w: 3 * plain(h, w, targets), (0, 1))
    (value, gradients), (_, plain_gradients) = ours(hidden, head), expected(hidden, head)
    np.testing.assert_allclose(value, 3 * np.mean(nats), rtol=1e-13)
    for one, other in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)
    np.testing.assert_allclose(cross_entropy.mean_cross_entropy(hidden, head, targets), np.mean(nats), rtol=1e-13)
    np.testing.assert_allclose(cross_entropy.blocked_token_losses(hidden, head, targets), nats, rtol=1e-12)


def test_far_logits_do_not_overflow() -> None:
    """Of logits 1000 and -1000, the second costs 2000 nats and the first none; float32's exp(1000) is infinite."""
    logits = jnp.array([[1000.0, -1000.0]] * 2)
    assert cross_entropy.token_losses(logits, jnp.array([1, 0])).tolist() == [2000, 0]


def zero_columns(dtype: str, scale: float) -> float:
    """The share of the head's columns whose gradient is exactly 0, for 64 tokens with logits of deviation 16."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(64, 256)), dtype)
    head = jnp.asarray(rng.normal(size=(256, 1000)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 1000, 64))
    factor = jnp.float32(scale)

    def scaled(head):
        return factor * cross_entropy.mean_cross_entropy(hidden, head, targets, loss_scale=factor)

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
