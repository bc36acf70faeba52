"""Causal attention by blocks of 128 queries equals all scores at once, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.kernels import query_blocks as blocking
from moe_jax.model.kernels.causal_attention import causal_attention
from moe_jax.model.kernels.query_blocks import QUERY_BLOCK, SPANS, query_blocks, query_spans
from tests.support import kernel_checks


@pytest.mark.parametrize(("length", "dropout"), [(7, 0.0), (128, 0.3), (129, 0.0), (300, 0.3)])
def test_blocked_is_the_reference(length: int, dropout: float) -> None:
    """Output and the gradients for a random cotangent: one short block, one whole one, two and three."""
    assert QUERY_BLOCK == 128
    assert len(query_blocks(length)) == {7: 1, 128: 1, 129: 2, 300: 3}[length]
    kernel_checks.check_causal_attention(length, dropout)


@pytest.mark.parametrize(("length", "spans"), [(7, 1), (128, 1), (700, 2)])
def test_recomputed_is_the_reference(length: int, spans: int) -> None:
    """A short block, a whole one, two spans of three blocks; the last block is filled up.
    The dropout is tried where a span has several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocking, "SPANS", 2)
        assert len(query_spans(length)) == spans
    kernel_checks.check_long_attention(length, 0.3 if length == 700 else 0.0)


def test_spans_are_whole_blocks_and_cover_every_query() -> None:
    for length in (1, 128, 1024, 1025, 5000, 8192, 2**20):
        spans = query_spans(length)
        assert [s for s, _ in spans] == [0, *(e for _, e in spans[:-1])]
        assert spans[-1][1] == length
        assert len(spans) <= SPANS
        assert all(first % QUERY_BLOCK == 0 for first, _ in spans)


def test_long_sequences_keep_no_weights() -> None:
    """The compiled program's memory for as many tokens in sequences four times as long. Kept weights would take four
    times as much; here a block's scores do, of which the compiler may hold one more."""

    def temporary(batch: int, length: int) -> int:
        shape = jax.ShapeDtypeStruct((batch, 2, length, 16), jnp.float32)
        loss = jax.grad(lambda q, k, v: causal_attention(q, k, v).sum(), argnums=(0, 1, 2))
        analysis = jax.jit(loss).lower(shape, shape, shape).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(1, 8192) < 1.3 * temporary(4, 2048)


@pytest.mark.parametrize("implementation", ["blocked", "recomputed", "reference"])
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
    """In bfloat16 all forms have bfloat16 outputs and gradients, near the float32 ones (8 bits: 2^-8 a rounding)."""
    rng = np.random.default_rng(1)
    wide = [jnp.asarray(rng.normal(size=(1, 2, 140, 8)), jnp.float32) for _ in range(4)]

    def run(implementation: str, *args):
        out, pull = jax.vjp(lambda q, k, v: causal_attention(q, k, v, implementation=implementation), *args[:3])
        return out, *pull(args[3])

    exact = run("reference", *wide)
    for implementation in ("blocked", "recomputed", "reference"):
        for one, other in zip(run(implementation, *(x.astype(jnp.bfloat16) for x in wide)), exact, strict=True):
            assert one.dtype == jnp.bfloat16
            error = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
            assert error < 6 * 2**-8
