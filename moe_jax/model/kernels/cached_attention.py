"""Attention of new tokens to the places of a cache, one token of each sequence or several.

On a CPU a single token takes loops that read only the places in use: `row_sum` for its scores, and one value after
another for the sum. So a token costs what its position costs, whatever the length of the context, and a sequence
without a token costs nothing. Elsewhere, and for several tokens, two of XLA's products read every place of every
sequence (`_whole_cache`).

The cache has S places. Keys have the places as their last axis, values as the axis before it. So both forms read it in
its order in memory.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.matmul import part_at, row_at, row_sum
from moe_jax.model.kernels.processor import by_platform
from moe_jax.model.precision import at_least_float32, dot_precision

PLACES = 128
"""Places whose scores are computed together."""
VALUES = 4
"""Values that a turn adds."""


def cached_attention(
    query: Float[Array, "B N H A"],
    key: Float[Array, "B KV A S"],
    value: Float[Array, "B KV S A"],
    positions: Int[Array, "#B N"],
) -> Float[Array, "B N H A"]:
    """softmax(q k^T / sqrt(A)) v. A token attends to the places up to its position. Attention head h reads key and
    value head h // (H / KV). A token with a negative position gets NaN."""
    batch, tokens, heads, width = query.shape
    shared = heads // key.shape[1]
    # The queries of a group, of all N tokens, are rows of one product with their key head:
    # [B, N, H, A] -> [B, KV, H / KV, N, A] -> [B, KV, H / KV * N, A].
    groups = query.reshape(batch, tokens, -1, shared, width).transpose(0, 2, 3, 1, 4)
    rows = groups.reshape(batch, -1, shared * tokens, width)
    visible = jnp.tile(positions, shared)
    if tokens == 1:
        mixed = by_platform(rows, key, value, visible, cpu=_one_head_at_a_time, default=_whole_cache)
    else:
        mixed = _whole_cache(rows, key, value, visible)
    return mixed.reshape(groups.shape).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _whole_cache(
    rows: Float[Array, "B KV R A"],
    key: Float[Array, "B KV A S"],
    value: Float[Array, "B KV S A"],
    position: Int[Array, "#B R"],
) -> Float[Array, "B KV R A"]:
    """Two products with the whole cache."""
    wide, precision = at_least_float32(rows.dtype), dot_precision(rows.dtype)
    scores = jnp.einsum("bkra,bkas->bkrs", rows, key, precision=precision, preferred_element_type=wide)
    visible = jnp.arange(key.shape[-1]) <= position[:, None, :, None]
    scores = jnp.where(visible, scores / math.sqrt(rows.shape[-1]), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(rows.dtype)
    return jnp.einsum("bkrs,bksa->bkra", weights, value, precision=precision)


def _one_head_at_a_time(
    rows: Float[Array, "B KV R A"],
    key: Float[Array, "B KV A S"],
    value: Float[Array, "B KV S A"],
    position: Int[Array, "#B R"],
) -> Float[Array, "B KV R A"]:
    """One sequence and key head after another. All R rows have the position of the one token."""
    wide = at_least_float32(rows.dtype)
    used = jnp.broadcast_to(position[:, 0] + 1, rows.shape[:1])

    def of_head(n: Int[Array, ""], out: Array) -> Array:
        at = n // rows.shape[1], n % rows.shape[1]
        places = row_at(used, at[0])
        weights = _weights(row_at(rows, *at).astype(wide), key, at, places)
        mixed = jnp.where(places > 0, _mix(weights, value, at, places), jnp.nan)
        return out.at[at].set(mixed.astype(out.dtype))

    return jax.lax.fori_loop(0, math.prod(rows.shape[:2]), of_head, jnp.zeros_like(rows))


def _weights(
    rows: Float[Array, "R A"], key: Float[Array, "B KV A S"], at: tuple[Array, Array], used: Int[Array, ""]
) -> Float[Array, "R S"]:
    """The attention weights of the places in use, and 0 elsewhere, in at least float32."""
    size = key.shape[-1]
    block = min(PLACES, size)

    def score(i: Int[Array, ""], scores: Array) -> Array:
        first = i * block  # brought back to the last possible start, so the last two blocks may overlap

        def term(a: Int[Array, ""]) -> Array:
            return row_at(rows.T, a)[:, None] * part_at(key, *at, a, first, sizes=(block,)).astype(rows.dtype)

        total = row_sum(term, rows.shape[-1], jnp.zeros((len(rows), block), rows.dtype))
        return jax.lax.dynamic_update_slice_in_dim(scores, total, first, axis=1)

    blocks = (used + block - 1) // block
    scores = jax.lax.fori_loop(0, blocks, score, jnp.zeros((len(rows), size), rows.dtype))
    scores = jnp.where(jnp.arange(size) < used, scores / math.sqrt(rows.shape[-1]), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def _mix(
    weights: Float[Array, "R S"], value: Float[Array, "B KV S A"], at: tuple[Array, Array], used: Int[Array, ""]
) -> Float[Array, "R A"]:
    """The sum of the values in use, each times its weight, in the order of the places."""
    together = math.gcd(value.shape[2], VALUES)

    def add(i: Int[Array, ""], total: Array) -> Array:
        for place in range(together):
            s = i * together + place
            total = total + row_at(weights.T, s)[:, None] * row_at(value, *at, s).astype(total.dtype)
        return total

    turns = (used + together - 1) // together
    return jax.lax.fori_loop(0, turns, add, jnp.zeros((len(weights), value.shape[-1]), weights.dtype))
