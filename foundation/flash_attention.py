"""Attention in tiles of keys, forward and backward, without the matrix of weights. Derived in chapter 11.

Of each piece of keys keep three things for each query, and merge two pieces by bringing both to the larger m:

    m = max_s S_s        l = sum_s e^(S_s - m)                  o = sum_s e^(S_s - m) v_s
    m = max(m1, m2)      l = l1 e^(m1 - m) + l2 e^(m2 - m)      o = o1 e^(m1 - m) + o2 e^(m2 - m)

The answer is o / l. Kept for the backward pass are the answer and L = m + log l: P_s = e^(S_s - L), tile by tile. The
gradients are those of attention.py, with rowsum(d_P P)_t = <d_o_t, o_t> known before the first tile. l sums *undropped*
weights, and o dropped ones.

Sources: Milakov and Gimelshein 2018, section 3 (the running softmax); Dao et al. 2022, section 3.1 and appendix B.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from foundation.dropout import dropout_backward, dropout_forward

Rows = Float[Array, "*rows T"]
Heads = Float[Array, "*rows T A"]


def merge_parts(
    m1: Rows, l1: Rows, o1: Float[Array, "*rows T W"], m2: Rows, l2: Rows, o2: Float[Array, "*rows T W"]
) -> tuple[Rows, Rows, Float[Array, "*rows T W"]]:
    """(m, l, o) of two pieces of keys together. A piece in which nothing is seen has m = -inf, l = 0 and o = 0."""
    m = jnp.maximum(m1, m2)
    shift = jnp.where(jnp.isfinite(m), m, 0.0)  # -inf - (-inf) is NaN
    old, new = jnp.exp(m1 - shift), jnp.exp(m2 - shift)
    return m, old * l1 + new * l2, old[..., None] * o1 + new[..., None] * o2


def part_of_tile(
    scores: Float[Array, "*rows T S"], v: Float[Array, "*rows S W"], keep: Bool[Array, "*rows T S"] | None, rate: float
) -> tuple[Rows, Rows, Float[Array, "*rows T W"]]:
    """(m, l, o) of one tile. Dropout acts on what is mixed, not on what is summed."""
    m = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(m), m, 0.0)[..., None])
    kept, _ = dropout_forward(weights, keep, rate)
    return m, jnp.sum(weights, axis=-1), kept @ v


def tile_scores(q: Heads, k: Float[Array, "*rows S A"], first: int, causal: bool) -> Float[Array, "*rows T S"]:
    """S = q k^T / sqrt(A) for keys that begin at position `first`; -inf where a key is in the future."""
    scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    if not causal:
        return scores
    later = first + jnp.arange(k.shape[-2]) > jnp.arange(q.shape[-2])[:, None]
    return jnp.where(later, -jnp.inf, scores)


def flash_attention_forward(
    q: Heads, k: Heads, v: Heads, keep: Bool[Array, "*rows T T"] | None, rate: float, causal: bool, tile: int
) -> tuple[Heads, tuple]:
    """dropout(softmax(q k^T / sqrt(A))) v, in tiles of `tile` keys. No array is larger than T x max(tile, A), but for
    the mask `keep`, which a program that saves memory would draw again."""
    m = jnp.full(q.shape[:-1], -jnp.inf, q.dtype)
    total, o = jnp.zeros_like(m), jnp.zeros_like(v)
    for first in range(0, k.shape[-2], tile):
        here = slice(first, first + tile)
        scores = tile_scores(q, k[..., here, :], first, causal)
        part = part_of_tile(scores, v[..., here, :], None if keep is None else keep[..., here], rate)
        m, total, o = merge_parts(m, total, o, *part)
    o = o / total[..., None]
    return o, (q, k, v, keep, rate, causal, tile, o, m + jnp.log(total))


def flash_attention_backward(d_o: Heads, cache: tuple) -> tuple[Heads, Heads, Heads]:
    """(d_q, d_k, d_v). Each tile's weights are computed again from the logsumexp. d_q collects from all tiles; d_k and
    d_v of a tile are complete when the tile is done."""
    q, k, v, keep, rate, causal, tile, o, logsumexp = cache
    row_sum = jnp.sum(d_o * o, axis=-1, keepdims=True)
    d_q, d_k, d_v = jnp.zeros_like(q), [], []
    for first in range(0, k.shape[-2], tile):
        here = slice(first, first + tile)
        k_tile, v_tile = k[..., here, :], v[..., here, :]
        p = jnp.exp(tile_scores(q, k_tile, first, causal) - logsumexp[..., None])
        kept, dropout = dropout_forward(p, None if keep is None else keep[..., here], rate)
        d_p = dropout_backward(d_o @ jnp.swapaxes(v_tile, -1, -2), dropout)
        d_scores = p * (d_p - row_sum) / math.sqrt(q.shape[-1])
        d_q = d_q + d_scores @ k_tile
        d_k.append(jnp.swapaxes(d_scores, -1, -2) @ q)
        d_v.append(jnp.swapaxes(kept, -1, -2) @ d_o)
    return d_q, jnp.concatenate(d_k, axis=-2), jnp.concatenate(d_v, axis=-2)


def merged_output(
    scores: Float[Array, "T S"], v: Float[Array, "S W"], pieces: tuple[tuple[int, ...], ...]
) -> Float[Array, "T W"]:
    """softmax(scores) v from pieces of the keys, each a tuple of places, merged in the given order."""
    m = jnp.full(scores.shape[:1], -jnp.inf, scores.dtype)
    part = (m, jnp.zeros_like(m), jnp.zeros((scores.shape[0], v.shape[1]), v.dtype))
    for piece in pieces:
        places = jnp.array(piece)
        part = merge_parts(*part, *part_of_tile(scores[:, places], v[places], None, 0.0))
    _, total, o = part
    return o / total[:, None]
