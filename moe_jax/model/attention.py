"""Causal multi-head attention (Vaswani et al. 2017, section 3.2), whole or one token at a time with a cache."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import ModelConfig
from moe_jax.model.kernels.cached_attention import cached_attention
from moe_jax.model.kernels.causal_attention import Implementation, attention_weights, causal_attention
from moe_jax.model.kernels.processor import by_platform, split_heads
from moe_jax.model.kernels.quantized import product
from moe_jax.model.layers import Normalisation, apply_rope, matrix_init, with_bias
from moe_jax.model.low_rank import LowRank


class KeyValue(NamedTuple):
    """The cache of one layer: keys and values of the positions seen so far. It has S places, on different axes of the
    two arrays (`cached_attention` says why)."""

    key: Float[Array, "B KV A S"]
    value: Float[Array, "B KV S A"]


class Attention(nnx.Module):
    """Projections around `causal_attention`.

    Parameters: qkv `[D, (H + 2 KV) A]` as (q | k | v), q by (H, A), k and v by (KV, A); out `[H A, D]`; with `bias` one
    bias for each, with `qkv_bias` one for qkv. Attention head h reads key and value head h // (H / KV) (Ainslie et al.
    2023, section 2.2).

    With `qk_norm` also the scales of query_norm and key_norm, two RMSNorms before the rotation. `head` normalises each
    head, with scales `[A]` (Dehghani et al. 2023, section 2.1, use LayerNorm). `full` normalises all heads together,
    with scales `[H A]` and `[KV A]` (Muennighoff et al. 2024, "OLMoE", section 4.2).

    With `tie_value_output_init` each head starts as a *copier*: W_O = W_V^T. It then adds to the residual stream a
    projection of the tokens that it attends to. With a tied vocabulary head, this raises the logits of these tokens. At
    step 0 attention is spread over all earlier positions. So the words that have occurred in a text are already
    likelier, and the model only has to learn where to attend. With independent W_V and W_O, the model must first learn
    to map each token onto itself. (Trockman and Kolter 2023, section 3, find that W_V W_O is near a multiple of the
    identity in trained models, and start from there.)
    """

    qkv_lora: LowRank | None = None
    out_lora: LowRank | None = None
    """Adapters of the two matrices, in training only (`low_rank.py`)."""

    def __init__(
        self, config: ModelConfig, out_scale: float, rngs: nnx.Rngs, implementation: Implementation | None = None
    ) -> None:
        """`implementation` chooses the form of attention over whole sequences; None chooses by length
        (`causal_attention`)."""
        self.config = config
        self.implementation: Implementation | None = implementation
        width, head_width = config.width, config.head_width
        queries, keys = config.heads * head_width, config.key_value_heads * head_width
        self.qkv = nnx.Param(matrix_init(rngs, (width, queries + 2 * keys)))
        if config.tie_value_output_init:
            self.out = nnx.Param(self.qkv[...][:, 2 * width :].T)
        else:
            self.out = nnx.Param(matrix_init(rngs, (queries, width), out_scale))
        if config.bias or config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros(queries + 2 * keys))
        if config.bias:
            self.out_bias = nnx.Param(jnp.zeros(width))
        if config.qk_norm != "none":
            widths = (queries, keys) if config.qk_norm == "full" else (head_width, head_width)
            self.query_norm, self.key_norm = (
                Normalisation("rmsnorm", width, bias=False, eps=config.norm_eps) for width in widths
            )

    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "*B T"]
    ) -> tuple[Float[Array, "B T H A"], Float[Array, "B T KV A"], Float[Array, "B T KV A"]]:
        """Queries, keys and values."""
        rows = x.reshape(-1, x.shape[-1])
        qkv = product(rows, self.qkv[...])
        qkv = qkv if self.qkv_lora is None else qkv + self.qkv_lora(rows)
        if self.config.bias or self.config.qkv_bias:
            qkv = with_bias(qkv, self.qkv_bias[...])
        query, key, value = split_heads(qkv.reshape(*x.shape[:2], -1, self.config.head_width), self.config.heads)
        if self.config.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        elif self.config.qk_norm == "full":
            joined = (z.reshape(*z.shape[:2], -1) for z in (query, key))
            normalised = (norm(z) for norm, z in zip((self.query_norm, self.key_norm), joined, strict=True))
            query, key = (z.reshape(*z.shape[:2], -1, self.config.head_width) for z in normalised)
        if self.config.positions == "rope":
            theta, scaling = self.config.rope_theta, self.config.rope_scaling
            query, key = (apply_rope(z, positions, theta, scaling) for z in (query, key))
        if self.config.attention_multiplier:  # the scores are divided by sqrt(A) later
            query = query * (self.config.attention_multiplier * math.sqrt(self.config.head_width))
        return query, key, value

    def _output(self, mixed: Float[Array, "B T H A"]) -> Float[Array, "B T D"]:
        rows = mixed.reshape(-1, self.config.heads * self.config.head_width)
        y = product(rows, self.out[...])
        y = y if self.out_lora is None else y + self.out_lora(rows)
        y = with_bias(y, self.out_bias[...]) if self.config.bias else y
        return y.reshape(*mixed.shape[:2], -1)

    def __call__(
        self, x: Float[Array, "B T D"], keys: Key[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """The output at all positions, and their keys and values: the cache after a prefill.

        Random `keys`, one for each sequence, turn on the dropout of attention weights.
        """
        query, key, value = (z.swapaxes(1, 2) for z in self._project(x, jnp.arange(x.shape[1])))
        mixed = causal_attention(query, key, value, self.config.attention_dropout, keys, self.implementation)
        return self._output(mixed.swapaxes(1, 2)), KeyValue(key.swapaxes(2, 3), value)

    def weights(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T T"]:
        """Only the attention weights, without dropout, for a trace. The training pass never holds all of them."""
        query, key, _ = self._project(x, jnp.arange(x.shape[1]))
        return attention_weights(query.swapaxes(1, 2), key.swapaxes(1, 2))

    def decode(
        self, x: Float[Array, "B N D"], cache: KeyValue, index: Int[Array, "*B"]
    ) -> tuple[Float[Array, "B N D"], KeyValue]:
        """The output for N tokens from position `index` on, and the new cache. A token attends to the positions before
        it and to itself. `index` is one position for all sequences, or one for each. index + N must not exceed S.

        A sequence whose position is negative has no token: its output is NaN, and place 0 of its cache is lost."""
        positions = index[..., None] + jnp.arange(x.shape[1])
        query, key, value = self._project(x, positions)
        new_key, new_value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        written = _write(cache.key, new_key, index, axis=3), _write(cache.value, new_value, index, axis=2)
        # Without the barrier the compiler writes the new place twice, once for the products and once for the result,
        # and copies the whole cache.
        cache = KeyValue(*jax.lax.optimization_barrier(written))
        return self._output(cached_attention(query, *cache, jnp.atleast_2d(positions))), cache


def _write(cache: Float[Array, "B KV _ _"], new: Float[Array, "B KV _ _"], index: Int[Array, "*B"], axis: int) -> Array:
    """The cache with the new places of each sequence from its position on, along an axis. A sequence with
    a negative position gets its new places from place 0 on."""
    if index.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, index, axis)

    def in_turn(cache: Array, new: Array, index: Array) -> Array:
        def write_row(row: Array, cache: Array) -> Array:
            start = [row, 0, 0, 0]
            start[axis] = index[row]
            return jax.lax.dynamic_update_slice(cache, jax.lax.dynamic_slice_in_dim(new, row, 1), start)

        return jax.lax.fori_loop(0, len(cache), write_row, cache)

    at_once = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))  # a scatter, without a loop
    return by_platform(cache, new, jnp.maximum(index, 0), cpu=in_turn, default=at_once)
