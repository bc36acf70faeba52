"""The decoder-only language model: embedding, L pre-norm blocks, head.

Modules own parameters and nothing else: no state, no `sow`. What a pass has to say beside its output (router
statistics, keys and values) is returned. `split` turns a model into its static definition and a pure dict of
parameters; `merge` is the inverse, used inside jitted functions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import ModelConfig
from moe_jax.model.attention import Attention, KeyValue
from moe_jax.model.layers import Normalisation, dropout, embedding_init, look_up, matrix_init
from moe_jax.model.moe import DenseFFN, Mode, MoE, RouterStats
from moe_jax.model.ngrams import NgramEmbedding
from moe_jax.model.precision import at_least_float32

type Params = dict[str, Any]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        # Each of the 2L branches adds to the residual stream; scaled down, their sum has the variance of one.
        out_scale = 0.0 if config.quiet_branches else 1 / math.sqrt(2 * config.layers)
        self.dropout = config.dropout
        self.attention_norm = Normalisation(config.norm, config.width, config.bias)
        self.attention = Attention(config, out_scale, rngs)
        self.ffn_norm = Normalisation(config.norm, config.width, config.bias)
        self.ffn = (MoE if config.dense == "none" else DenseFFN)(config, out_scale, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mode: Mode,
        key: Key[Array, ""] | None,
        remat: bool = False,
        trace: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, KeyValue]:
        """With `remat` each half is recomputed in the backward pass, by itself: one half's activations exist at a
        time, for one more residual stream kept a block."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)

        def attend(block: Block, x: Array) -> tuple[Array, KeyValue]:
            with jax.named_scope("attention"):
                y, kv = block.attention(block.attention_norm(x), keys[0])
            return x + dropout(y, block.dropout, keys[1]), kv

        def feed(block: Block, x: Array) -> tuple[Array, RouterStats | None]:
            with jax.named_scope("ffn"):
                y, stats = block.ffn(
                    block.ffn_norm(x), mode, None if key is None else jax.random.fold_in(key, 3), trace
                )
            return x + dropout(y, block.dropout, keys[2]), stats

        between, kv = (jax.checkpoint(attend) if remat else attend)(self, x)
        after, stats = (jax.checkpoint(feed) if remat else feed)(self, between)
        if stats is not None and stats.trace is not None:
            weights = self.attention.weights(self.attention_norm(x))
            stats = stats._replace(trace=stats.trace._replace(attention=weights))
        return after, stats, kv

    def decode(
        self, x: Float[Array, "B 1 D"], cache: KeyValue, index: Int[Array, ""]
    ) -> tuple[Float[Array, "B 1 D"], KeyValue]:
        y, cache = self.attention.decode(self.attention_norm(x), cache, index)
        x = x + y
        y, _ = self.ffn(self.ffn_norm(x), Mode.GENERATE)
        return x + y, cache


class Transformer(nnx.Module):
    """The language model. Its compute precision is that of its activations: weights are cast where they are used.

    Parameters: embedding `[V, D]`, position `[T, D]` (learned positions), ngrams (those of `NgramEmbedding`), blocks,
    norm, head `[D, V]` (untied).
    """

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, compute: jnp.dtype | None = None, remat: bool = False
    ) -> None:
        """`compute` is the dtype of activations, float32 unless given; `remat` recomputes blocks when training."""
        self.config = config
        self.compute = jnp.dtype(compute or jnp.float32)
        self.remat = remat
        self.embedding = nnx.Param(embedding_init(rngs, (config.vocab_size, config.width)))
        if config.positions == "learned":
            self.position = nnx.Param(embedding_init(rngs, (config.seq_len, config.width)))
        if config.ngrams > 1:
            self.ngrams = NgramEmbedding(config.ngrams, config.ngram_rows, config.vocab_size, config.width)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = Normalisation(config.norm, config.width, config.bias)
        if not config.tied_head:
            self.head = nnx.Param(matrix_init(rngs, (config.width, config.vocab_size)))

    def before(self, tokens: Int[Array, "B T"], length: Int[Array, ""] | int) -> Int[Array, "B _"]:
        """The tokens that the n-grams of position `length` take in, oldest first: ids beyond the vocabulary where
        there are none, and no columns at all without n-grams."""
        if self.config.ngrams == 1:
            return tokens[:, :0]
        window = jnp.concatenate([self.ngrams.nothing_before(tokens.shape[0]), tokens], axis=1)
        return jax.lax.dynamic_slice_in_dim(window, length, self.config.ngrams - 1, axis=1)

    def _embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, " T"], before: Int[Array, "B _"]
    ) -> Float[Array, "B T D"]:
        x = look_up(self.embedding[...], tokens)
        if self.config.ngrams > 1:
            x = x + self.ngrams(tokens, before)
        if self.config.scaled_embedding:  # Vaswani et al. 2017, section 3.4
            x = x * math.sqrt(self.config.width)
        if self.config.positions == "learned":
            x = x + self.position[...][positions]
        return x.astype(self.compute)

    def __call__(
        self, tokens: Int[Array, "B T"], mode: Mode, key: Key[Array, ""] | None = None, trace: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, list[KeyValue]]:
        """Normalised hidden states of every position, for `logits`; the routers' statistics, each with a leading
        axis L (None for a dense twin); and each layer's keys and values. A key turns dropout, and the router's noise
        and jitter, on; `trace`, which is static, adds every decision of the routers to their statistics, and leaves
        the untraced program as it was.
        """
        keys = [None] * (len(self.blocks) + 1)
        config = self.config
        random = max(config.dropout, config.attention_dropout, config.router_noise, config.router_jitter) > 0
        if key is not None and random:
            keys = list(jax.random.split(key, len(self.blocks) + 1))
        x = self._embed(tokens, jnp.arange(tokens.shape[1]), self.before(tokens, 0))
        x = dropout(x, config.dropout, keys[0])
        stats: list[RouterStats | None] = []
        cache: list[KeyValue] = []
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x, layer_stats, kv = block(x, mode, block_key, remat=self.remat and mode is Mode.TRAIN, trace=trace)
            stats.append(layer_stats)
            cache.append(kv)
        stacked = None if stats[0] is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
        return self.norm(x), stacked, cache

    def head_matrix(self) -> Float[Array, "D V"]:
        return self.embedding[...].T if self.config.tied_head else self.head[...]

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """In at least float32: products of the compute dtype, summed wide."""
        with jax.named_scope("head"):
            head = self.head_matrix().astype(hidden.dtype)
            return jnp.matmul(hidden, head, preferred_element_type=at_least_float32(hidden.dtype))

    def decode(
        self, token: Int[Array, " B"], before: Int[Array, "B _"], cache: list[KeyValue], index: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], list[KeyValue]]:
        """Logits after the token at position `index`, and the cache that includes it; `before` as of the method."""
        x = self._embed(token[:, None], index[None], before)
        new: list[KeyValue] = []
        for block, kv in zip(self.blocks, cache, strict=True):
            x, kv = block.decode(x, kv, index)
            new.append(kv)
        return self.logits(self.norm(x)[:, 0]), new


def create(
    config: ModelConfig, key: Key[Array, ""], compute: jnp.dtype | None = None, remat: bool = False
) -> Transformer:
    """A model with initial parameters. `config.vocab_size` must be known by now."""
    if config.vocab_size < 1:
        raise ValueError("vocab_size is 0: take it from the tokenizer first (dataclasses.replace)")
    return Transformer(config, nnx.Rngs(params=key), compute, remat)


def split(model: Transformer) -> tuple[nnx.GraphDef, Params]:
    """The static definition, and the parameters as a pure nested dict."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> Transformer:
    """The inverse of `split`."""
    return nnx.merge(graphdef, nnx.State(jax.tree.map(lambda x: x, params)))
