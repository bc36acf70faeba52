"""Causal attention by blocks of 128 queries equals all scores at once, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.kernels.causal_attention import QUERY_BLOCK, causal_attention, query_blocks
from tests.support import kernel_checks


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("length", [7, 128, 129, 300])
def test_blocked_is_the_reference(length: int, dropout: float) -> None:
    """Output and the gradients for a random cotangent: one short block, one whole one, two and three."""
    assert QUERY_BLOCK == 128
    assert len(query_blocks(length)) == {7: 1, 128: 1, 129: 2, 300: 3}[length]
    kernel_checks.check_causal_attention(length, dropout)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_dropout_needs_a_rate_and_a_key(implementation: str) -> None:
    query, key, value = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 2, 140, 4)), jnp.float32)

    def attend(*dropout) -> np.ndarray:
        return np.asarray(causal_attention(query, key, value, *dropout, implementation=implementation))

    plain = attend()
    assert (attend(0.5, None) == plain).all()
    assert (attend(0.0, jax.random.split(jax.random.key(0), 1)) == plain).all()
    one, again, other = (attend(0.5, jax.random.split(jax.random.key(seed), 1)) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one[:, :, :128] != other[:, :, :128]).any()
    assert (one[:, :, 128:] != other[:, :, 128:]).any()


def test_narrow_operands_give_narrow_results() -> None:
    """In bfloat16 both forms have bfloat16 outputs and gradients, near the float32 ones (8 bits: 2^-8 a rounding)."""
    rng = np.random.default_rng(1)
    wide = [jnp.asarray(rng.normal(size=(1, 2, 140, 8)), jnp.float32) for _ in range(4)]

    def run(implementation: str, *args):
        out, pull = jax.vjp(lambda q, k, v: causal_attention(q, k, v, implementation=implementation), *args[:3])
        return out, *pull(args[3])

    exact = run("reference", *wide)
    for implementation in ("blocked", "reference"):
        for one, other in zip(run(implementation, *(x.astype(jnp.bfloat16) for x in wide)), exact, strict=True):
            assert one.dtype == jnp.bfloat16
            error = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
            assert error < 6 * 2**-8
