"""Attention against NumPy loops, its hand-written gradient against jax.grad of the plain form, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.kernels import causal_attention as kernel
from moe_jax.model.kernels.causal_attention import causal_attention
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import create, merge
from tests.support import oracles, tiny

BLOCK = 4
LENGTHS = [1, 3, 4, 11]  # shorter than a block, one block, several of which the last is short


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    monkeypatch.setattr(kernel, "QUERY_BLOCK", BLOCK)


def operands(length: int) -> list[jax.Array]:
    """Query, key, value, and a cotangent: [B, H, T, A]."""
    rng = np.random.default_rng(length)
    return [jnp.asarray(rng.normal(size=(2, 2, length, 3))) for _ in range(4)]


def plain(query, key, value, mask, keep):
    scores = jnp.einsum("bhqd,bhsd->bhqs", query, key) / np.sqrt(3)
    visible = np.tril(np.ones(scores.shape[-2:], bool))
    e = jnp.where(visible, jnp.exp(scores), 0)
    weights = e / e.sum(-1, keepdims=True)
    if mask is not None:
        weights = weights * mask / keep
    return weights @ value


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_against_loops(length: int) -> None:
    query, key, value, _ = operands(length)
    expected = oracles.attention(*map(np.asarray, (query, key, value)))
    for implementation in ("blocked", "reference"):
        attend = functools.partial(causal_attention, implementation=implementation)
        np.testing.assert_allclose(jax.jit(attend)(query, key, value), expected, atol=1e-13, err_msg=implementation)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("length", [1, 4, 11])
def test_attention_gradient(length: int, dropped: bool, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms against the plain one, under the same mask of kept weights."""
    query, key, value, cotangent = operands(length)
    mask = np.random.default_rng(3).random((2, 2, length, length)) < 0.7 if dropped else None
    masks = None
    if mask is not None:
        ends = [(a, min(a + BLOCK, length)) for a in range(0, length, BLOCK)]
        masks = [jnp.asarray(mask[:, :, a:b, :b]) for a, b in ends]
    monkeypatch.setattr(kernel, "_dropout_masks", lambda *_: masks)

    def attend(q, k, v):
        return causal_attention(q, k, v, 0.3, jax.random.split(jax.random.key(0), 2), implementation)

    @jax.jit
    def both(*args):
        ours, pull = jax.vjp(attend, *args)
        expected, pull_plain = jax.vjp(lambda q, k, v: plain(q, k, v, mask, 0.7), *args)
        return (ours, *pull(cotangent)), (expected, *pull_plain(cotangent))

    ours, expected = both(query, key, value)
    for name, one, other in zip(("out", "d_query", "d_key", "d_value"), ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-13, err_msg=name)


def test_masks_fit_the_blocks_and_keep_the_share_asked_for() -> None:
    masks = kernel._dropout_masks((8, 4, 11, 3), 0.25, jax.random.split(jax.random.key(0), 8))
    assert [m.shape for m in masks] == [(8, 4, 4, 4), (8, 4, 4, 8), (8, 4, 3, 11)]
    share = np.concatenate([np.asarray(m).ravel() for m in masks])
    assert abs(share.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / share.size)
    assert kernel._dropout_masks((8, 4, 11, 3), 0.25, None) is None
    assert kernel._dropout_masks((8, 4, 11, 3), 0.0, jax.random.split(jax.random.key(0), 8)) is None


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_layer_projects_normalises_rotates_and_attends(qk_norm: bool) -> None:
    """The module against loops: projections with biases, heads, their norms, rotary positions, output."""
    config = tiny.config(layers=1, bias=True, norm="layernorm", qk_norm=qk_norm)
    graphdef, params = tiny.build(config, dtype="float64")
    p = jax.tree.map(np.asarray, params["blocks"][0]["attention"])
    x = np.random.default_rng(0).normal(size=(2, 5, 8))
    qkv = (x @ p["qkv"] + p["qkv_bias"]).reshape(2, 5, 3, 2, 4)
    query, key, value = (qkv[:, :, i].swapaxes(1, 2).copy() for i in range(3))
    for z, name in ((query, "query_norm"), (key, "key_norm")):
        for b, h, t in np.ndindex(z.shape[:3]):
            row = oracles.rms_norm(z[b, h, t], p[name]["scale"]) if qk_norm else z[b, h, t]
            z[b, h, t] = oracles.rotate(row, t)
    mixed = oracles.attention(query, key, value).swapaxes(1, 2).reshape(2, 5, 8)
    y, cache = jax.jit(lambda x: merge(graphdef, params).blocks[0].attention(x))(jnp.asarray(x))
    np.testing.assert_allclose(y, mixed @ p["out"] + p["out_bias"], atol=1e-12)
    np.testing.assert_allclose(cache.key, key.swapaxes(2, 3), atol=1e-13)
    np.testing.assert_allclose(cache.value, value.swapaxes(2, 3), atol=1e-13)


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
