"""Causal multi-head attention (Vaswani et al. 2017, section 3.2), whole or one token at a time with a cache."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import ModelConfig
from moe_jax.model.layers import Normalisation, keep_mask, matrix_init, rotate
from moe_jax.model.precision import at_least_float32
from moe_jax.model.products import product, turned


class KeyValue(NamedTuple):
    """Keys and values of the positions seen so far, of one layer. S places; those not yet seen are masked.

    Places are the last axis, since both products of a decoded token then read the cache as it lies. With places before
    heads, the compiler turned the whole cache at every token: a third of the time of a batch of 32 on a CPU.
    """

    key: Float[Array, "B H A S"]
    value: Float[Array, "B H A S"]


QUERY_BLOCK = 128
"""Queries that are attended at once. A block sees no keys after its last query, so blocks skip part of the upper
triangle: a quarter of all scores at T = 256, seven sixteenths at T = 1024."""


def _softmax(scores: Float[Array, "B H Q S"], visible: Bool[Array, "Q S"]) -> Float[Array, "B H Q S"]:
    """Softmax over the visible places; the others get exactly 0."""
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def query_blocks(positions: int) -> list[tuple[int, int]]:
    """(first, end) of each block of queries; its keys are [0, end)."""
    return [(first, min(first + QUERY_BLOCK, positions)) for first in range(0, positions, QUERY_BLOCK)]


def _weights(query: Array, key: Array, first: int) -> Array:
    """The attention weights of a block of queries that starts at position `first`, in at least float32."""
    scores = jnp.einsum("bhqd,bhsd->bhqs", query, key, preferred_element_type=at_least_float32(query.dtype))
    places = jnp.arange(key.shape[2])
    visible = places[first:, None] >= places[None, :]
    return _softmax(scores / math.sqrt(query.shape[-1]), visible)


@jax.custom_vjp
def attend_causally(
    query: Float[Array, "B H T A"],
    key: Float[Array, "B H T A"],
    value: Float[Array, "B H T A"],
    masks: list[Bool[Array, "B H _ _"]] | None,
    keep: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B H T A"]:
    """o = (P * mask / keep) v with P = softmax(q k^T / sqrt(A)) over each query's own and earlier positions.

    `masks`, one for each block of queries, drop attention weights; None drops nothing. With W = P * mask / keep:

        d_v = W^T d_o        d_P = (d_o v^T) * mask / keep
        d_S = P * (d_P - rowsum(d_P * P)) = P * (d_P - rowsum(d_o * o))
        d_q = d_S k / sqrt(A)        d_k = d_S^T q / sqrt(A)

    Written by hand for two reasons: the row sum needs T x A numbers instead of T x T, and P^T d_o is computed as
    (d_o^T P)^T, which turns two small arrays instead of one large one. Together about twice as fast on a CPU.
    """
    return _attend_forward(query, key, value, masks, keep)[0]


def _attend_forward(query: Array, key: Array, value: Array, masks: list[Array] | None, keep: float | Array):
    outputs, weights = [], []
    for i, (first, end) in enumerate(query_blocks(query.shape[2])):
        # The barrier: the backward pass is to keep the weights, and not the scores beside them.
        p = jax.lax.optimization_barrier(_weights(query[:, :, first:end], key[:, :, :end], first).astype(query.dtype))
        w = p if masks is None else jnp.where(masks[i], p / keep, 0).astype(p.dtype)
        outputs.append(jnp.einsum("bhqs,bhsd->bhqd", w, value[:, :, :end]))
        weights.append(p)
    out = jnp.concatenate(outputs, axis=2)
    return out, (query, key, value, masks, keep, out, weights)


def _attend_backward(residuals, d_out: Array):
    # The barrier: blocks of queries and dropped weights are made anew, and not before d_out is there, or the compiler
    # keeps those of the forward pass.
    (query, key, value, masks, keep, out, weights), d_out = jax.lax.optimization_barrier((residuals, d_out))
    wide = at_least_float32(query.dtype)
    row_sum = jnp.sum(d_out * out, axis=-1, keepdims=True, dtype=wide)
    d_query = []
    d_key_t = jnp.zeros_like(key, dtype=wide).swapaxes(2, 3)
    d_value_t = d_key_t
    for i, ((first, end), p) in enumerate(zip(query_blocks(query.shape[2]), weights, strict=True)):
        d_o, q = d_out[:, :, first:end], query[:, :, first:end]
        w = p if masks is None else jnp.where(masks[i], p / keep, 0).astype(p.dtype)
        d_value_t = d_value_t.at[..., :end].add(turned(d_o) @ w)
        d_p = jnp.einsum("bhqd,bhsd->bhqs", d_o, value[:, :, :end], preferred_element_type=wide)
        if masks is not None:
            d_p = jnp.where(masks[i], d_p / keep, 0)
        d_s = (p * (d_p - row_sum[:, :, first:end]) / math.sqrt(query.shape[-1])).astype(query.dtype)
        d_query.append(jnp.einsum("bhqs,bhsd->bhqd", d_s, key[:, :, :end]))
        d_key_t = d_key_t.at[..., :end].add(turned(q) @ d_s)
    d_key, d_value = (x.swapaxes(2, 3).astype(key.dtype) for x in (d_key_t, d_value_t))
    return jnp.concatenate(d_query, axis=2), d_key, d_value, None, None


attend_causally.defvjp(_attend_forward, _attend_backward)


def _dropout_masks(shape: tuple[int, ...], rate: float, key: Key[Array, ""] | None) -> list[Array] | None:
    """Which attention weights are kept, for each block of queries of `[B, H, T, A]`."""
    if key is None or rate == 0:
        return None
    batch, heads, positions, _ = shape
    return [
        keep_mask(jax.random.fold_in(key, first), rate, (batch, heads, end - first, end))
        for first, end in query_blocks(positions)
    ]


class Attention(nnx.Module):
    """Projections around `attend`. Parameters: qkv `[D, 3D]` as (q | k | v), each (H, A); out `[D, D]`; biases; with
    `qk_norm` the scales `[A]` of query_norm and key_norm, RMSNorms by head before the rotation (Dehghani et al. 2023,
    section 2.1, with LayerNorm).

    Heads that start as *copiers* have W_O = W_V^T: what a head adds to the residual stream is a projection of what
    it looks at, and under a tied head that raises the logit of the very token it looks at. With attention uniform
    as it starts, the words of a story become likelier in it at step 0, and where to look is all that is left to
    learn. (Trockman and Kolter 2023, section 3, find W_V W_O near a multiple of the identity in trained models, and
    start from there.) From independent W_V and W_O, the map of every name onto itself must be learned first.
    """

    def __init__(self, config: ModelConfig, out_scale: float, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.width
        self.qkv = nnx.Param(matrix_init(rngs, (width, 3 * width)))
        out = self.qkv[...][:, 2 * width :].T if config.copying_heads else matrix_init(rngs, (width, width), out_scale)
        self.out = nnx.Param(out)
        if config.bias:
            self.qkv_bias = nnx.Param(jnp.zeros(3 * width))
            self.out_bias = nnx.Param(jnp.zeros(width))
        if config.qk_norm:
            self.query_norm = Normalisation("rmsnorm", config.head_width, bias=False)
            self.key_norm = Normalisation("rmsnorm", config.head_width, bias=False)

    def _project(self, x: Float[Array, "B T D"], positions: Int[Array, " T"]) -> tuple[Float[Array, "B T H A"], ...]:
        """Queries, keys and values."""
        qkv = product(x.reshape(-1, x.shape[-1]), self.qkv[...])
        if self.config.bias:
            qkv = qkv + self.qkv_bias[...].astype(x.dtype)
        qkv = qkv.reshape(*x.shape[:2], 3, self.config.heads, self.config.head_width)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.positions == "rope":
            query, key = rotate(query, positions), rotate(key, positions)
        return query, key, value

    def _output(self, mixed: Float[Array, "B T H A"]) -> Float[Array, "B T D"]:
        y = product(mixed.reshape(-1, self.config.width), self.out[...])
        y = y + self.out_bias[...].astype(y.dtype) if self.config.bias else y
        return y.reshape(*mixed.shape[:2], -1)

    def __call__(
        self, x: Float[Array, "B T D"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """All positions at once; also their keys and values, which are the cache after a prefill."""
        query, keys, values = (z.swapaxes(1, 2) for z in self._project(x, jnp.arange(x.shape[1])))
        rate = self.config.attention_dropout
        masks = _dropout_masks(query.shape, rate, key)
        mixed = attend_causally(query, keys, values, masks, 1 - rate)
        return self._output(mixed.swapaxes(1, 2)), KeyValue(keys.swapaxes(2, 3), values.swapaxes(2, 3))

    def weights(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T T"]:
        """The attention weights alone, without dropout, for a trace: the training pass never has them all at once."""
        query, key, _ = self._project(x, jnp.arange(x.shape[1]))
        return _weights(query.swapaxes(1, 2), key.swapaxes(1, 2), 0)

    def decode(
        self, x: Float[Array, "B 1 D"], cache: KeyValue, index: Int[Array, ""]
    ) -> tuple[Float[Array, "B 1 D"], KeyValue]:
        """The token at position `index`, which sees the cached places before it and itself."""
        query, *new = self._project(x, index[None])
        written = [
            jax.lax.dynamic_update_slice_in_dim(old, now.transpose(0, 2, 3, 1), index, axis=3)
            for old, now in zip(cache, new, strict=True)
        ]
        # The barrier: else the compiler writes the new place twice, for the products and for the result, and copies
        # the whole cache to have two of it.
        cache = KeyValue(*jax.lax.optimization_barrier(written))
        wide = at_least_float32(x.dtype)
        scores = jnp.einsum("bqha,bhas->bhqs", query, cache.key, preferred_element_type=wide)
        visible = jnp.arange(cache.key.shape[-1])[None, :] <= index
        weights = _softmax(scores / math.sqrt(query.shape[-1]), visible).astype(x.dtype)
        return self._output(jnp.einsum("bhqs,bhas->bqha", weights, cache.value)), cache
