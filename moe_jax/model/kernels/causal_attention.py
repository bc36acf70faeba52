"""Causal attention over whole sequences (Vaswani et al. 2017, section 3.2): one function, with three implementations.

With o = W v, W = P * mask / keep, and P = softmax(q k^T / sqrt(A)), the gradients are

    d_v = W^T d_o        d_W = d_o v^T        d_P = d_W * mask / keep
    d_S = P * (d_P - rowsum(d_P * P)) = W * d_W - P * rowsum(d_o * o)
    d_q = d_S k / sqrt(A)        d_k = d_S^T q / sqrt(A)

The sums over queries in d_v and d_k run over the queries of all heads of a group.

The gradients are written by hand for three reasons. The row sum is taken over d_o * o, [T, A], instead of d_P * P,
[T, T]. And W^T d_o is computed as (d_o^T W)^T, which transposes two small arrays instead of a large one. Together this
is about twice as fast on a CPU. And where T is large, P is computed once more in the backward pass instead of being
kept (Dao et al. 2022, "FlashAttention", section 3.1, here by whole rows of P), so memory grows with T, not with T^2.

Chapter 11 of `foundation` derives this, the row sum under dropout included, and a test compares the gradients.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.model import kernels as blocking
from moe_jax.model.kernels.matmul import transpose_contiguous
from moe_jax.model.layers import keep_mask
from moe_jax.model.precision import at_least_float32, dot_precision
from moe_jax.system.random_keys import fold_each

Implementation = Literal["blocked", "recomputed", "cudnn"]


def causal_attention(
    query: Float[Array, "B H T A"],
    key: Float[Array, "B KV T A"],
    value: Float[Array, "B KV T A"],
    dropout: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B H T A"]:
    """softmax(q k^T / sqrt(A)) v, where each query attends to its own and earlier positions.

    Attention head h reads key and value head h // (H / KV). A group of heads is computed as one head with H / KV times
    as many queries (`_by_group`), so no key or value is ever copied.

    `dropout` is the share of attention weights that are set to 0. `dropout_keys` are one key for each sequence; without
    them nothing is set to 0.

    blocked     one block of queries after another; the weights are kept for the backward pass
    recomputed  the same in a loop; the backward pass computes the weights once more
    cudnn       NVIDIA's library, on its cards only (`library_attention.py` says when)

    Unless one is asked for, sequences of up to `LONGEST_KEPT` positions take `blocked`, longer ones `recomputed`.
    """
    positions = query.shape[2]
    implementation = implementation or ("blocked" if positions <= blocking.LONGEST_KEPT else "recomputed")
    keys = dropout_keys if dropout else None
    if implementation == "cudnn":
        if keys is not None:
            raise ValueError(f"dropout {dropout}: cuDNN's attention has none; take another implementation")
        operands = (x.swapaxes(1, 2) for x in (query, key, value))  # cuDNN takes the heads after the positions
        return jax.nn.dot_product_attention(*operands, is_causal=True, implementation="cudnn").swapaxes(1, 2)
    if implementation == "recomputed":
        return _attend_again(dropout, query, key, value, keys)
    blocks = blocking.query_blocks(positions)
    masks = None if keys is None else [_dropout_mask(query, dropout, keys, *block) for block in blocks]
    return _attend_by_blocks(query, key, value, masks, 1 - dropout)


def attention_weights(
    query: Float[Array, "B H Q A"], key: Float[Array, "B KV S A"], first: int | Int[Array, ""] = 0
) -> Float[Array, "B H Q S"]:
    """The attention weights of queries that start at position `first`, in at least float32, without dropout."""
    scores = _einsum("bhqd,bhsd->bhqs", _by_group(query, key), key, at_least_float32(query.dtype))
    scores = scores.reshape(*query.shape[:3], key.shape[2])
    places = jnp.arange(key.shape[2])
    visible = first + jnp.arange(query.shape[2])[:, None] >= places[None, :]
    return masked_softmax(scores / math.sqrt(query.shape[-1]), visible)


def _by_group(x: Float[Array, "B H Q N"], like: Float[Array, "B KV S A"]) -> Float[Array, "B KV GQ N"]:
    """The rows of the G = H / KV heads that share a key head, one head after another. It moves nothing in memory."""
    return x.reshape(*like.shape[:2], -1, x.shape[-1])


def _einsum(axes: str, left: Array, right: Array, out: jnp.dtype | None = None) -> Array:
    """A product of two operands of one dtype, in that dtype unless `out` is given."""
    return jnp.einsum(axes, left, right, precision=dot_precision(left.dtype), preferred_element_type=out)


def masked_softmax(scores: Float[Array, "B H Q S"], visible: Bool[Array, "#Q S"]) -> Float[Array, "B H Q S"]:
    """Softmax over the visible places, by adding -inf to the others, which get exactly 0.

    On a CPU, XLA makes one loop of the product before, this sum and the softmax. With `jnp.where` it makes three, which
    read and write all scores.
    """
    return jax.nn.softmax(scores + jnp.where(visible, 0, -jnp.inf).astype(scores.dtype), axis=-1)


def _dropout_mask(
    query: Float[Array, "B H _ A"], rate: float, keys: Key[Array, " B"], first: int | Int[Array, ""], end: int
) -> Bool[Array, "B H Q {end}"]:
    """Which weights of the queries [first, end) are kept, or of one whole block from `first` on if that is traced. A
    block's mask depends on its first query and on the number of its keys."""
    block = end - first if isinstance(first, int) else blocking.QUERY_BLOCK
    return keep_mask(fold_each(keys, first), rate, (query.shape[1], block, end))


def _dropped(p: Float[Array, "B H Q S"], mask: Bool[Array, "B H Q S"] | None, keep: float | Array) -> Array:
    """W, the weights after dropout."""
    return p if mask is None else jnp.where(mask, p / keep, 0).astype(p.dtype)


def _mix(w: Float[Array, "B H Q S"], value: Float[Array, "B KV S A"]) -> Float[Array, "B H Q A"]:
    """o = W v."""
    mixed = _einsum("bhqs,bhsd->bhqd", _by_group(w, value), value)
    return mixed.reshape(*w.shape[:3], -1)


def _block_gradients(
    p: Float[Array, "B H Q S"],
    mask: Bool[Array, "B H Q S"] | None,
    keep: float | Array,
    query: Float[Array, "B H Q A"],
    key: Float[Array, "B KV S A"],
    value: Float[Array, "B KV S A"],
    d_out: Float[Array, "B H Q A"],
    row_sum: Float[Array, "B H Q 1"],
) -> tuple[Float[Array, "B H Q A"], Float[Array, "B KV A S"], Float[Array, "B KV A S"]]:
    """d_q of a block of queries, and its share of d_k and d_v, both transposed."""
    w = _dropped(p, mask, keep)
    d_o, q = _by_group(d_out, value), _by_group(query, key)
    d_value = _einsum("bhdq,bhqs->bhds", transpose_contiguous(d_o), _by_group(w, value))
    d_w = _einsum("bhqd,bhsd->bhqs", d_o, value, at_least_float32(query.dtype)).reshape(p.shape)
    d_s = ((w * d_w - p * row_sum) / math.sqrt(query.shape[-1])).astype(query.dtype)
    d_s = _by_group(d_s, key)
    d_query = _einsum("bhqs,bhsd->bhqd", d_s, key).reshape(query.shape)
    d_key = _einsum("bhdq,bhqs->bhds", transpose_contiguous(q), d_s)
    return d_query, d_key, d_value


# The weights are kept for the backward pass


@jax.custom_vjp
def _attend_by_blocks(
    query: Float[Array, "B H T A"],
    key: Float[Array, "B KV T A"],
    value: Float[Array, "B KV T A"],
    masks: list[Bool[Array, "B H _ _"]] | None,
    keep: float | Float[Array, ""],
) -> Float[Array, "B H T A"]:
    """o = W v, with the gradients of this file's head."""
    return _forward(query, key, value, masks, keep)[0]


def _forward(query: Array, key: Array, value: Array, masks: list[Array] | None, keep: float | Array):
    queries, outputs, weights = [], [], []
    for i, (first, end) in enumerate(blocking.query_blocks(query.shape[2])):
        queries.append(query[:, :, first:end])
        p = attention_weights(queries[i], key[:, :, :end], first).astype(query.dtype)
        # With the barrier, the backward pass keeps only the weights, not the scores too.
        p = jax.lax.optimization_barrier(p)
        w = _dropped(p, None if masks is None else masks[i], keep)
        outputs.append(_mix(w, value[:, :, :end]))
        weights.append(p)
    return jnp.concatenate(outputs, axis=2), (queries, key, value, masks, keep, outputs, weights)


def _backward(residuals, d_out: Array):
    # The weights after dropout are recomputed for each block. The barrier makes this wait for d_out; without it, the
    # compiler keeps the arrays of the forward pass instead.
    blocks = blocking.query_blocks(d_out.shape[2])
    d_outputs = [d_out[:, :, first:end] for first, end in blocks]
    residuals, d_outputs = jax.lax.optimization_barrier((residuals, d_outputs))
    queries, key, value, masks, keep, outputs, weights = residuals
    d_query = []
    d_key_t = jnp.zeros_like(key, dtype=at_least_float32(key.dtype)).swapaxes(2, 3)
    d_value_t = d_key_t
    for i, (_, end) in enumerate(blocks):
        block = weights[i], None if masks is None else masks[i], keep, queries[i], key[:, :, :end], value[:, :, :end]
        d_q, d_k, d_v = _block_gradients(*block, d_outputs[i], _row_sum(d_outputs[i], outputs[i]))
        d_query.append(d_q)
        d_key_t, d_value_t = d_key_t.at[..., :end].add(d_k), d_value_t.at[..., :end].add(d_v)
    d_key, d_value = (x.swapaxes(2, 3).astype(key.dtype) for x in (d_key_t, d_value_t))
    return jnp.concatenate(d_query, axis=2), d_key, d_value, None, None


_attend_by_blocks.defvjp(_forward, _backward)


def _row_sum(d_out: Float[Array, "B H Q A"], out: Float[Array, "B H Q A"]) -> Float[Array, "B H Q 1"]:
    return jnp.sum(d_out * out, axis=-1, keepdims=True, dtype=at_least_float32(out.dtype))


# The weights are computed once more in the backward pass


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_again(
    rate: float,
    query: Float[Array, "B H T A"],
    key: Float[Array, "B KV T A"],
    value: Float[Array, "B KV T A"],
    dropout_keys: Key[Array, " B"] | None,
) -> Float[Array, "B H T A"]:
    """o = W v. No array here has more than `QUERY_BLOCK` x T numbers for a sequence and a head."""
    return _forward_again(rate, query, key, value, dropout_keys)[0]


def _forward_again(rate: float, query: Array, key: Array, value: Array, keys: Array | None):
    outputs = []
    for first, end in blocking.query_spans(query.shape[2]):

        def block(_: None, at: tuple, end: int = end) -> tuple[None, Array]:
            start, q = at
            p = attention_weights(q, key[:, :, :end], start).astype(q.dtype)
            mask = None if keys is None else _dropout_mask(q, rate, keys, start, end)
            return None, _mix(_dropped(p, mask, 1 - rate), value[:, :, :end])

        (q,) = _blocks(first, end, query)
        outputs.append(_unblocked(jax.lax.scan(block, None, (_starts(first, end), q))[1], end - first))
    out = jnp.concatenate(outputs, axis=2)
    return out, (query, key, value, keys, out)


def _backward_again(rate: float, residuals, d_out: Array):
    # With the barrier the weights are computed again. Without it, the compiler may keep those of a short span.
    (query, key, value, keys, out), d_out = jax.lax.optimization_barrier((residuals, d_out))
    row_sum = _row_sum(d_out, out)
    d_query = []
    d_key_t = jnp.zeros_like(key, dtype=row_sum.dtype).swapaxes(2, 3)
    d_value_t = d_key_t
    for first, end in blocking.query_spans(query.shape[2]):

        def block(sums: tuple, at: tuple, end: int = end) -> tuple[tuple, Array]:
            start, q, d_o, rows = at
            k, v = key[:, :, :end], value[:, :, :end]
            p = attention_weights(q, k, start).astype(q.dtype)
            mask = None if keys is None else _dropout_mask(q, rate, keys, start, end)
            d_q, d_k, d_v = _block_gradients(p, mask, 1 - rate, q, k, v, d_o, rows)
            return (sums[0] + d_k, sums[1] + d_v), d_q

        nothing = jnp.zeros_like(d_key_t[..., :end])
        blocks = (_starts(first, end), *_blocks(first, end, query, d_out, row_sum))
        (d_k, d_v), d_q = jax.lax.scan(block, (nothing, nothing), blocks)
        d_query.append(_unblocked(d_q, end - first))
        d_key_t, d_value_t = d_key_t.at[..., :end].add(d_k), d_value_t.at[..., :end].add(d_v)
    d_key, d_value = (x.swapaxes(2, 3).astype(key.dtype) for x in (d_key_t, d_value_t))
    return jnp.concatenate(d_query, axis=2), d_key, d_value, None


_attend_again.defvjp(_forward_again, _backward_again)


def _starts(first: int, end: int) -> Int[Array, " N"]:
    """The first position of each block of a span."""
    return jnp.arange(first, end, blocking.QUERY_BLOCK)


def _blocks(first: int, end: int, *arrays: Float[Array, "B H T _"]) -> list[Float[Array, "N B H Q _"]]:
    """The blocks of a span. The last one is filled up with rows of zeros, whose gradients are zeros."""
    count = math.ceil((end - first) / blocking.QUERY_BLOCK)
    filled = [(0, 0), (0, 0), (0, count * blocking.QUERY_BLOCK - (end - first)), (0, 0)]
    padded = [jnp.pad(x[:, :, first:end], filled) for x in arrays]
    return [jnp.moveaxis(x.reshape(*x.shape[:2], count, blocking.QUERY_BLOCK, -1), 2, 0) for x in padded]


def _unblocked(blocks: Float[Array, "N B H Q A"], rows: int) -> Float[Array, "B H T A"]:
    """The rows of a span from its blocks, without those that filled it up."""
    moved = jnp.moveaxis(blocks, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, moved.shape[-1])[:, :, :rows]
