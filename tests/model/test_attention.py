"""Attention and its hand-written gradient against jax.grad of the plain form, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import kernels as blocking
from moe_jax.model.kernels import causal_attention as kernel
from moe_jax.model.kernels import processor
from moe_jax.model.kernels.causal_attention import causal_attention

BLOCK = 4


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    monkeypatch.setattr(blocking, "QUERY_BLOCK", BLOCK)


def operands(length: int, heads: int = 2, key_heads: int = 2) -> list[jax.Array]:
    """Query, key, value, and a cotangent: [B, H, T, A], of key and value [B, KV, T, A]."""
    rng = np.random.default_rng(length)
    return [jnp.asarray(rng.normal(size=(2, n, length, 3))) for n in (heads, key_heads, key_heads, heads)]


def plain(query, key, value, mask, keep):
    key, value = (jnp.repeat(z, query.shape[1] // z.shape[1], axis=1) for z in (key, value))
    scores = jnp.einsum("bhqd,bhsd->bhqs", query, key) / np.sqrt(3)
    visible = np.tril(np.ones(scores.shape[-2:], bool))
    e = jnp.where(visible, jnp.exp(scores), 0)
    weights = e / e.sum(-1, keepdims=True)
    if mask is not None:
        weights = weights * mask / keep
    return weights @ value


@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_gradient_of_the_heads_is_their_concatenation(key_heads: int) -> None:
    """As numbers, and in the program, where padded arrays would be slow on a CPU."""
    heads = 4 + 2 * key_heads
    qkv = jnp.arange(2 * 3 * heads * 5, dtype=jnp.float32).reshape(2, 3, heads, 5)
    parts, pull = jax.vjp(lambda qkv: processor.split_heads(qkv, 4), qkv)
    assert [part.shape[2] for part in parts] == [4, key_heads, key_heads]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=2), qkv)
    np.testing.assert_array_equal(pull(parts)[0], qkv)
    assert "stablehlo.pad" not in jax.jit(pull).lower(parts).as_text()


def test_no_key_is_copied_for_its_group() -> None:
    """Eight heads, one key head, blocks of 4 queries: the keys that a block reads, 8 or 12 of them, occur for one head,
    and never for eight."""
    query, key = jnp.zeros((1, 8, 16, 2)), jnp.zeros((1, 1, 16, 2))
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: jax.vjp(causal_attention, q, k, v)[1](q))(query, key, key))
    for keys in (8, 12):
        assert f"f64[1,1,{keys},2]" in jaxpr
        assert f"f64[1,8,{keys},2]" not in jaxpr


@pytest.mark.parametrize("implementation", ["blocked", "recomputed"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("length", "heads"), [(4, 2), (11, 4)])
def test_attention_gradient(
    length: int, heads: int, dropped: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms with a gradient by hand against the plain one, under the same mask of kept weights. Four heads share
    two key heads. Of two spans, the first one has two blocks at T = 11."""
    query, key, value, cotangent = operands(length, heads)
    mask = np.random.default_rng(3).random((2, heads, length, length)) < 0.7 if dropped else None
    keys = None if mask is None else jax.random.split(jax.random.key(0), 2)
    monkeypatch.setattr(blocking, "SPANS", 2)

    def given(query: Any, rate: float, keys: Any, first: Any, end: int) -> jax.Array:
        """The mask's rows of a block; a whole block where the first row is traced."""
        rows = end - first if isinstance(first, int) else BLOCK
        filled = jnp.pad(jnp.asarray(mask), ((0, 0), (0, 0), (0, BLOCK), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(filled, first, rows, axis=2)[..., :end]

    monkeypatch.setattr(kernel, "_dropout_mask", given)

    def attend(q, k, v):
        return causal_attention(q, k, v, 0.3, keys, implementation)

    @jax.jit
    def both(*args):
        ours, pull = jax.vjp(attend, *args)
        expected, pull_plain = jax.vjp(lambda q, k, v: plain(q, k, v, mask, 0.7), *args)
        return (ours, *pull(cotangent)), (expected, *pull_plain(cotangent))

    ours, expected = both(query, key, value)
    for name, one, other in zip(("out", "d_query", "d_key", "d_value"), ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-13, err_msg=name)
