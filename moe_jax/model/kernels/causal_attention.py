"""Causal attention over whole sequences (Vaswani et al. 2017, section 3.2): one function, with two implementations."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from moe_jax.model.kernels.matmul import transpose_contiguous
from moe_jax.model.layers import keep_mask
from moe_jax.model.precision import at_least_float32, dot_precision
from moe_jax.system.random_keys import fold_each

Implementation = Literal["blocked", "reference"]

QUERY_BLOCK = 128
"""Queries of a block. A block computes no scores for keys after its last query, so blocks skip part of the upper
triangle of the score matrix: a quarter of all scores at T = 256, seven sixteenths at T = 1024."""


def causal_attention(
    query: Float[Array, "B H T A"],
    key: Float[Array, "B KV T A"],
    value: Float[Array, "B KV T A"],
    dropout: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
    implementation: Implementation = "blocked",
) -> Float[Array, "B H T A"]:
    """softmax(q k^T / sqrt(A)) v, where each query attends to its own and earlier positions.

    Attention head h reads key and value head h // (H / KV). A group of heads is computed as one head with H / KV times
    as many queries (`_by_group`), so no key or value is ever copied.

    `dropout` is the share of attention weights that are set to 0. `dropout_keys` are one key for each sequence; without
    them nothing is set to 0.

    blocked     one block of queries after another, with gradients written by hand
    reference   all scores at once, differentiated by jax; the tests compare `blocked` with it
    """
    masks = _dropout_masks(query.shape, dropout, dropout_keys)
    if implementation == "reference":
        weights = attention_weights(query, key).astype(query.dtype)
        if masks is not None:
            whole = [jnp.pad(m, ((0, 0), (0, 0), (0, 0), (0, query.shape[2] - m.shape[3]))) for m in masks]
            weights = jnp.where(jnp.concatenate(whole, axis=2), weights / (1 - dropout), 0).astype(query.dtype)
        return _einsum("bhqs,bhsa->bhqa", _by_group(weights, value), value).reshape(query.shape)
    return _attend_by_blocks(query, key, value, masks, 1 - dropout)


def attention_weights(
    query: Float[Array, "B H Q A"], key: Float[Array, "B KV S A"], first: int = 0
) -> Float[Array, "B H Q S"]:
    """The attention weights of queries that start at position `first`, in at least float32, without dropout."""
    scores = _einsum("bhqd,bhsd->bhqs", _by_group(query, key), key, at_least_float32(query.dtype))
    scores = scores.reshape(*query.shape[:3], key.shape[2])
    places = jnp.arange(key.shape[2])
    visible = places[first:, None] >= places[None, :]
    return masked_softmax(scores / math.sqrt(query.shape[-1]), visible)


def _by_group(x: Float[Array, "B H Q N"], like: Float[Array, "B KV S A"]) -> Float[Array, "B KV GQ N"]:
    """The rows of the G = H / KV heads that share a key head, one head after another. It moves nothing in memory."""
    return x.reshape(*like.shape[:2], -1, x.shape[-1])


def _einsum(axes: str, left: Array, right: Array, out: jnp.dtype | None = None) -> Array:
    """A product of two operands of one dtype, in that dtype unless `out` is given."""
    return jnp.einsum(axes, left, right, precision=dot_precision(left.dtype), preferred_element_type=out)


def masked_softmax(scores: Float[Array, "B H Q S"], visible: Bool[Array, "#Q S"]) -> Float[Array, "B H Q S"]:
    """Softmax over the visible places. The others get exactly 0. One row of `visible` serves all queries."""
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def query_blocks(positions: int) -> list[tuple[int, int]]:
    """(first, end) of each block of queries. The keys of a block are [0, end)."""
    return [(first, min(first + QUERY_BLOCK, positions)) for first in range(0, positions, QUERY_BLOCK)]


def _dropout_masks(shape: tuple[int, ...], rate: float, keys: Key[Array, " B"] | None) -> list[Array] | None:
    """Which attention weights are kept, for each block of queries of `[B, H, T, A]`. None drops nothing."""
    if keys is None or rate == 0:
        return None
    _, heads, positions, _ = shape
    return [
        keep_mask(fold_each(keys, first), rate, (heads, end - first, end)) for first, end in query_blocks(positions)
    ]


@jax.custom_vjp
def _attend_by_blocks(
    query: Float[Array, "B H T A"],
    key: Float[Array, "B KV T A"],
    value: Float[Array, "B KV T A"],
    masks: list[Bool[Array, "B H _ _"]] | None,
    keep: float | Float[Array, ""],
) -> Float[Array, "B H T A"]:
    """o = (P * mask / keep) v with P = softmax(q k^T / sqrt(A)). With W = P * mask / keep:

        d_v = W^T d_o        d_P = (d_o v^T) * mask / keep
        d_S = P * (d_P - rowsum(d_P * P)) = P * (d_P - rowsum(d_o * o))
        d_q = d_S k / sqrt(A)        d_k = d_S^T q / sqrt(A)

    The sums over queries in d_v and d_k run over the queries of all heads of a group.

    The gradients are written by hand for two reasons. The row sum is taken over d_o * o, [T, A], instead of d_P * P,
    [T, T]. And W^T d_o is computed as (d_o^T W)^T, which transposes two small arrays instead of a large one. Together
    this is about twice as fast on a CPU.
    """
    return _forward(query, key, value, masks, keep)[0]


def _forward(query: Array, key: Array, value: Array, masks: list[Array] | None, keep: float | Array):
    outputs, weights = [], []
    for i, (first, end) in enumerate(query_blocks(query.shape[2])):
        p = attention_weights(query[:, :, first:end], key[:, :, :end], first).astype(query.dtype)
        # With the barrier, the backward pass keeps only the weights, not the scores too.
        p = jax.lax.optimization_barrier(p)
        w = p if masks is None else jnp.where(masks[i], p / keep, 0).astype(p.dtype)
        mixed = _einsum("bhqs,bhsd->bhqd", _by_group(w, value), value[:, :, :end])
        outputs.append(mixed.reshape(*query.shape[:2], end - first, -1))
        weights.append(p)
    out = jnp.concatenate(outputs, axis=2)
    return out, (query, key, value, masks, keep, out, weights)


def _backward(residuals, d_out: Array):
    # The weights after dropout are recomputed for each block. The barrier makes this wait for d_out; without it, the
    # compiler keeps the arrays of the forward pass instead.
    (query, key, value, masks, keep, out, weights), d_out = jax.lax.optimization_barrier((residuals, d_out))
    wide = at_least_float32(query.dtype)
    row_sum = jnp.sum(d_out * out, axis=-1, keepdims=True, dtype=wide)
    d_query = []
    d_key_t = jnp.zeros_like(key, dtype=wide).swapaxes(2, 3)
    d_value_t = d_key_t
    for i, ((first, end), p) in enumerate(zip(query_blocks(query.shape[2]), weights, strict=True)):
        d_o, q = d_out[:, :, first:end], query[:, :, first:end]
        w = p if masks is None else jnp.where(masks[i], p / keep, 0).astype(p.dtype)
        d_o, q = _by_group(d_o, value), _by_group(q, key)
        d_value_t = d_value_t.at[..., :end].add(
            _einsum("bhdq,bhqs->bhds", transpose_contiguous(d_o), _by_group(w, value))
        )
        d_p = _einsum("bhqd,bhsd->bhqs", d_o, value[:, :, :end], wide).reshape(p.shape)
        if masks is not None:
            d_p = jnp.where(masks[i], d_p / keep, 0)
        d_s = (p * (d_p - row_sum[:, :, first:end]) / math.sqrt(query.shape[-1])).astype(query.dtype)
        d_s = _by_group(d_s, key)
        d_q = _einsum("bhqs,bhsd->bhqd", d_s, key[:, :, :end])
        d_query.append(d_q.reshape(*query.shape[:2], end - first, -1))
        d_key_t = d_key_t.at[..., :end].add(_einsum("bhdq,bhqs->bhds", transpose_contiguous(q), d_s))
    d_key, d_value = (x.swapaxes(2, 3).astype(key.dtype) for x in (d_key_t, d_value_t))
    return jnp.concatenate(d_query, axis=2), d_key, d_value, None, None


_attend_by_blocks.defvjp(_forward, _backward)
