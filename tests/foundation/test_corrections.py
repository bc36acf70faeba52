"""What the texts of `foundation` say in words, measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundation import attention, router


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.mark.parametrize("rotary", [False, True])
def test_a_key_bias_has_gradient_zero_only_where_keys_are_not_rotated(rotary: bool) -> None:
    params = {
        "qkv": {"kernel": normal(0, 8, 24), "bias": normal(1, 24)},
        "out": {"kernel": normal(2, 8, 8)},
    }

    @jax.jit
    def gradient(x: jax.Array, d_y: jax.Array) -> dict:
        return attention.multi_head_backward(d_y, attention.multi_head_forward(x, params, 2, rotary)[1])[1]

    d_params = gradient(normal(3, 2, 5, 8), normal(4, 2, 5, 8))
    d_key_bias = jnp.max(jnp.abs(d_params["qkv"]["bias"][8:16]))
    assert (d_key_bias > 0.1) if rotary else (d_key_bias < 1e-13)


def test_the_balance_loss_pushes_logits_with_a_factor_p() -> None:
    x, kernel = jnp.eye(5)[None], 2.0 * normal(0, 5, 4)  # the gradient of the kernel is that of the logits

    @jax.jit
    def by_hand(x: jax.Array, kernel: jax.Array) -> tuple:
        routing, cache = router.router_forward(x, kernel, 2)
        zero = jnp.zeros_like(routing.gates)
        return routing, router.router_backward(zero, jnp.ones(()), jnp.zeros(()), cache)[1]

    routing, d_logits = by_hand(x, kernel)
    p, f = jax.nn.softmax(kernel), router.choice_share(routing.experts, 4, kernel.dtype)
    closed_form = p * 4 / 5 * (f - jnp.sum(p * f, axis=-1, keepdims=True))
    np.testing.assert_allclose(d_logits, closed_form, rtol=1e-12, atol=1e-15)


def test_the_balance_loss_sees_the_choices_and_can_be_below_one() -> None:
    """By hand: f = (3/4, 1/4), P = (1.58/4, 2.42/4), so 2 (3/4 * 0.395 + 1/4 * 0.605) = 0.895. 1 is not its minimum."""
    p = jnp.array([[0.51, 0.49]] * 3 + [[0.05, 0.95]])
    routing, _ = router.router_forward(jnp.log(p)[None], jnp.eye(2), 1)
    assert float(routing.balance) == pytest.approx(0.895, rel=1e-14)
    balanced, _ = router.router_forward(jnp.log(jnp.array([[0.6, 0.4], [0.4, 0.6]]))[None], jnp.eye(2), 1)
    assert float(balanced.balance) == pytest.approx(1.0, rel=1e-14)
