"""Attention against NumPy loops, its hand-written gradient against jax.grad of the plain form, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import attention
from moe_jax.model.kernels import causal_attention as kernel
from moe_jax.model.kernels import query_blocks
from moe_jax.model.kernels.causal_attention import causal_attention
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import create, merge
from tests.support import oracles, tiny

BLOCK = 4


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    monkeypatch.setattr(query_blocks, "QUERY_BLOCK", BLOCK)


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


@pytest.mark.parametrize(("length", "heads", "key_heads"), [(1, 2, 2), (4, 2, 2), (11, 4, 1), (11, 4, 2)])
def test_attention_against_loops(length: int, heads: int, key_heads: int) -> None:
    """One position, one block, several blocks of which the last is short; heads that share key heads."""
    query, key, value, _ = operands(length, heads, key_heads)
    expected = oracles.attention(*map(np.asarray, (query, key, value)))
    for implementation in ("blocked", "recomputed", "reference"):
        attend = functools.partial(causal_attention, implementation=implementation)
        np.testing.assert_allclose(jax.jit(attend)(query, key, value), expected, atol=1e-13, err_msg=implementation)


@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_gradient_of_the_heads_is_their_concatenation(key_heads: int) -> None:
    """As numbers, on any device; and on a CPU also in the program, where padded arrays would be slow."""
    heads = 4 + 2 * key_heads
    qkv = jnp.arange(2 * 3 * heads * 5, dtype=jnp.float32).reshape(2, 3, heads, 5)
    parts, pull = jax.vjp(lambda qkv: attention._split(qkv, 4), qkv)
    assert [part.shape[2] for part in parts] == [4, key_heads, key_heads]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=2), qkv)
    np.testing.assert_array_equal(pull(parts)[0], qkv)

    def back(*parts: jax.Array) -> jax.Array:
        return attention._split_backward(4, None, parts)[0]

    exported = {on: jax.jit(back).trace(*parts).lower(lowering_platforms=(on,)).as_text() for on in ("cpu", "cuda")}
    assert "stablehlo.pad" not in exported["cpu"]
    assert "stablehlo.pad" in exported["cuda"]


def test_no_key_is_copied_for_its_group() -> None:
    """Eight heads, one key head, blocks of 4 queries: the keys that a block reads, 8 or 12 of them, occur for one head,
    and never for eight."""
    query, key = jnp.zeros((1, 8, 16, 2)), jnp.zeros((1, 1, 16, 2))
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: jax.vjp(causal_attention, q, k, v)[1](q))(query, key, key))
    for keys in (8, 12):
        assert f"f64[1,1,{keys},2]" in jaxpr
        assert f"f64[1,8,{keys},2]" not in jaxpr


@pytest.mark.parametrize("implementation", ["blocked", "recomputed", "reference"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("length", "heads"), [(4, 2), (11, 4)])
def test_attention_gradient(
    length: int, heads: int, dropped: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All forms against the plain one, under the same mask of kept weights. Four heads share two key heads. Of two
    spans, the first one has two blocks at T = 11."""
    query, key, value, cotangent = operands(length, heads)
    mask = np.random.default_rng(3).random((2, heads, length, length)) < 0.7 if dropped else None
    keys = None if mask is None else jax.random.split(jax.random.key(0), 2)
    monkeypatch.setattr(query_blocks, "SPANS", 2)

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


def test_masks_fit_the_blocks_and_keep_the_share_asked_for() -> None:
    query, keys = jnp.zeros((8, 4, 11, 3)), jax.random.split(jax.random.key(0), 8)
    masks = [kernel._dropout_mask(query, 0.25, keys, *block) for block in query_blocks.query_blocks(11)]
    assert [m.shape for m in masks] == [(8, 4, 4, 4), (8, 4, 4, 8), (8, 4, 3, 11)]
    share = np.concatenate([np.asarray(m).ravel() for m in masks])
    assert abs(share.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / share.size)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "head"},
        {"qk_norm": "full", "heads": 4, "kv_heads": 2, "head_size": 6, "rope_theta": 50.0, "norm_eps": 0.5},
        {"qk_norm": "head", "heads": 4, "kv_heads": 1, "norm_eps": 0.5},
    ],
    ids=str,
)
def test_the_layer_projects_normalises_rotates_and_attends(changes: dict[str, Any]) -> None:
    """The module against loops: projections with biases, heads, their norms, rotary positions, output."""
    config = tiny.config(layers=1, bias=True, norm="layernorm", **changes)
    heads, key_heads = config.heads, changes.get("kv_heads") or config.heads
    width, eps = changes.get("head_size", 8 // heads), changes.get("norm_eps", 1e-6)
    graphdef, params = tiny.build(config, dtype="float64")
    p = jax.tree.map(np.asarray, params["blocks"][0]["attention"])
    x = np.random.default_rng(0).normal(size=(2, 5, 8))
    qkv = x @ p["qkv"] + p["qkv_bias"]
    parts = [qkv[..., : heads * width], *np.split(qkv[..., heads * width :], 2, axis=-1)]
    if changes.get("qk_norm") == "full":
        for part, name in zip(parts, ("query_norm", "key_norm"), strict=False):
            for b, t in np.ndindex(2, 5):
                part[b, t] = oracles.rms_norm(part[b, t], p[name]["scale"], eps)
    query, key, value = (part.reshape(2, 5, -1, width).swapaxes(1, 2).copy() for part in parts)
    assert (query.shape[1], key.shape[1], value.shape[1]) == (heads, key_heads, key_heads)
    for z, name in ((query, "query_norm"), (key, "key_norm")):
        for b, h, t in np.ndindex(z.shape[:3]):
            row = z[b, h, t]
            if changes.get("qk_norm") == "head":
                row = oracles.rms_norm(row, p[name]["scale"], eps)
            z[b, h, t] = oracles.rotate(row, t, changes.get("rope_theta", 10_000))
    mixed = oracles.attention(query, key, value).swapaxes(1, 2).reshape(2, 5, heads * width)
    y, cache = jax.jit(lambda x: merge(graphdef, params).blocks[0].attention(x))(jnp.asarray(x))
    np.testing.assert_allclose(y, mixed @ p["out"] + p["out_bias"], atol=1e-12)
    np.testing.assert_allclose(cache.key, key.swapaxes(2, 3), atol=1e-13)
    np.testing.assert_allclose(cache.value, value, atol=1e-13)


def test_heads_that_start_as_copiers_make_what_was_said_likelier() -> None:
    """At step 0 of a tied model: tokens of the context get larger logits than others, and without it they do not."""

    def advantage(tied: bool) -> float:
        config = tiny.config(vocab_size=64, width=32, heads=4, layers=2, tie_value_output_init=tied)
        model = create(config, jax.random.key(0))
        attention_ = model.blocks[0].attention
        value = np.asarray(attention_.qkv[...])[:, 2 * 32 :]
        assert (np.asarray(attention_.out[...]) == value.T).all() == tied
        said = jnp.asarray(np.random.default_rng(0).permutation(64)[None, : tiny.T])
        logits = np.asarray(model.logits(model(said, Mode.TRAIN)[0]))[0, -1]
        earlier = np.zeros(64, bool)
        earlier[np.asarray(said)[0, :-1]] = True  # not the last token itself, which the residual stream holds
        others = ~earlier
        others[int(said[0, -1])] = False
        return float((logits[earlier].mean() - logits[others].mean()) / logits.std())

    assert advantage(True) > 0.5
    assert abs(advantage(False)) < 0.5
