"""Scaled dot-product attention, and causal multi-head attention with its projections. Derived in chapter 5.

    S = q k^T / sqrt(A)     d_q = d_S k / sqrt(A)             d_k = d_S^T q / sqrt(A)
    P = softmax(S)          d_S = P * (d_P - <P, d_P>)        row by row
    o = P v                 d_P = d_o v^T                     d_v = P^T d_o

A masked score has P = 0, and d_S has the factor P, so the mask needs no line of its own.

Multi-head: one projection x -> (q | k | v), a split into heads, the above, the heads side by side again, and an output
projection. Fewer key heads than heads, and normalised queries and keys, are in grouped_heads.py.

Source: Vaswani et al. 2017, section 3.2.1, equation 1, and section 3.2.2.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from foundation.dropout import dropout_backward, dropout_forward
from foundation.grouped_heads import (
    normalise_heads_backward,
    normalise_heads_forward,
    share_heads_backward,
    share_heads_forward,
)
from foundation.linear import linear_backward, linear_forward
from foundation.norms import RMSNORM_EPS
from foundation.positions import ROPE_BASE, rope_backward, rope_forward
from foundation.softmax import softmax_backward, softmax_forward

Heads = Float[Array, "*rows T A"]


def attention_forward(
    q: Heads,
    k: Float[Array, "*rows S A"],
    v: Float[Array, "*rows S W"],
    mask: Bool[Array, "..."] | None = None,
    keep: Bool[Array, "*rows T S"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[Array, "*rows T W"], tuple]:
    """o = dropout(softmax(q k^T / sqrt(A))) v, over any leading axes.

    `mask` broadcasts to [*rows, T, S], True where position t may look at s; a row that sees nothing gives 0.
    `keep` is the dropout mask of the weights, `rate` its rate.
    """
    scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])  # [*rows, T, S]
    p, softmax_cache = softmax_forward(scores, mask)
    kept, dropout_cache = dropout_forward(p, keep, rate)
    return kept @ v, (q, k, v, kept, softmax_cache, dropout_cache)


def attention_backward(
    d_o: Float[Array, "*rows T W"], cache: tuple
) -> tuple[Heads, Float[Array, "*rows S A"], Float[Array, "*rows S W"]]:
    """(d_q, d_k, d_v)."""
    q, k, v, kept, softmax_cache, dropout_cache = cache
    d_kept = d_o @ jnp.swapaxes(v, -1, -2)
    d_v = jnp.swapaxes(kept, -1, -2) @ d_o
    d_p = dropout_backward(d_kept, dropout_cache)
    d_scores = softmax_backward(d_p, softmax_cache) / math.sqrt(q.shape[-1])
    return d_scores @ k, jnp.swapaxes(d_scores, -1, -2) @ q, d_v


def causal_mask(positions: int) -> Bool[Array, "T T"]:
    """True where s <= t: position t sees itself and what came before."""
    return jnp.tril(jnp.ones((positions, positions), bool))


def split_heads(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B H T A"]:
    """[B, T, (H A)] -> [B, H, T, A]. A permutation of entries: its adjoint is `join_heads`, its inverse."""
    batch, positions, _ = x.shape
    return x.reshape(batch, positions, heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: Float[Array, "B H T A"]) -> Float[Array, "B T D"]:
    """[B, H, T, A] -> [B, T, (H A)], the inverse of `split_heads`."""
    batch, heads, positions, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, positions, heads * width)


def multi_head_forward(
    x: Float[Array, "B T D"],
    params: dict,
    heads: int,
    rotary: bool = False,
    keep: Bool[Array, "B H T T"] | None = None,
    rate: float = 0.0,
    base: float = ROPE_BASE,
    eps: float = RMSNORM_EPS,
    slowed: Float[Array, " pairs"] | float = 1.0,
) -> tuple[Float[Array, "B T D"], tuple]:
    """Causal multi-head self-attention.

    params: {"qkv": {"kernel" [D, (H + 2 KV) A], "bias"?}, "out": {"kernel" [H A, D], "bias"? [D]}, "query_norm"?:
    {"scale"}, "key_norm"?: {"scale"}}; the columns of qkv are all of q, then k, then v, each by head. A and the number
    of key heads KV follow from the shapes; the scales are [A], or [H A] and [KV A]. `rotary` turns q and k by RoPE,
    with `slowed` pairs.
    """
    qkv, qkv_cache = linear_forward(x, params["qkv"]["kernel"], params["qkv"].get("bias"))
    queries = params["out"]["kernel"].shape[0]  # H A
    keys = (qkv.shape[-1] - queries) // 2  # KV A
    q, k, v = jnp.split(qkv, (queries, queries + keys), axis=-1)
    norm_caches = rope_cache = None
    if "query_norm" in params:
        q, query_cache = normalise_heads_forward(q, params["query_norm"]["scale"], eps)
        k, key_cache = normalise_heads_forward(k, params["key_norm"]["scale"], eps)
        norm_caches = (query_cache, key_cache)
    q = split_heads(q, heads)
    k, v = (split_heads(part, keys // q.shape[-1]) for part in (k, v))
    if rotary:
        q, rope_cache = rope_forward(q, base, slowed)
        k, _ = rope_forward(k, base, slowed)  # the same angles
    k, shared_cache = share_heads_forward(k, heads)
    v, _ = share_heads_forward(v, heads)
    o, attention_cache = attention_forward(q, k, v, causal_mask(x.shape[1]), keep, rate)
    y, out_cache = linear_forward(join_heads(o), params["out"]["kernel"], params["out"].get("bias"))
    return y, (qkv_cache, norm_caches, rope_cache, shared_cache, attention_cache, out_cache)


def multi_head_backward(d_y: Float[Array, "B T D"], cache: tuple) -> tuple[Float[Array, "B T D"], dict]:
    """(d_x, d_params): the forward lines in reverse order, each replaced by its adjoint."""
    qkv_cache, norm_caches, rope_cache, shared_cache, attention_cache, out_cache = cache
    d_params = {}
    d_joined, d_params["out"] = _projection_backward(d_y, out_cache)
    d_q, d_k, d_v = attention_backward(split_heads(d_joined, attention_cache[0].shape[1]), attention_cache)
    d_k, d_v = share_heads_backward(d_k, shared_cache), share_heads_backward(d_v, shared_cache)
    if rope_cache is not None:
        d_q, d_k = rope_backward(d_q, rope_cache), rope_backward(d_k, rope_cache)
    d_q, d_k, d_v = join_heads(d_q), join_heads(d_k), join_heads(d_v)
    if norm_caches is not None:
        d_q, d_query_scale = normalise_heads_backward(d_q, norm_caches[0])
        d_k, d_key_scale = normalise_heads_backward(d_k, norm_caches[1])
        d_params |= {"query_norm": {"scale": d_query_scale}, "key_norm": {"scale": d_key_scale}}
    d_x, d_params["qkv"] = _projection_backward(jnp.concatenate([d_q, d_k, d_v], axis=-1), qkv_cache)
    return d_x, d_params


def _projection_backward(d_y: Float[Array, "B T O"], cache: tuple) -> tuple[Float[Array, "B T I"], dict]:
    d_x, d_kernel, d_bias = linear_backward(d_y, cache)
    return d_x, {"kernel": d_kernel} if d_bias is None else {"kernel": d_kernel, "bias": d_bias}
