"""The decoder-only language model: embedding, L pre-norm blocks, head.

Modules own parameters and nothing else: no other state, and no flax `sow`. A pass returns its router statistics, keys
and values beside its output. `split` turns a model into its static definition and a pure dict of parameters. `merge` is
the inverse; jitted functions use it.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import Activation, ModelConfig, ParamDtype
from moe_jax.model.attention import Attention, KeyValue
from moe_jax.model.kernels.causal_attention import Implementation
from moe_jax.model.kernels.embedding_lookup import embedding_lookup
from moe_jax.model.kernels.matmul import matmul_wide
from moe_jax.model.kernels.quantized import quantized_matmul
from moe_jax.model.layers import Normalisation, dropout, embedding_init, matrix_init
from moe_jax.model.low_rank import Adapters, LoraShape, adapters_in, add_adapters
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import Mode, MoE, RouterStats
from moe_jax.model.moe.router import DECISIONS
from moe_jax.model.precision import at_least_float32, to_param_dtype
from moe_jax.model.quantized import QuantizedMatrix
from moe_jax.system.random_keys import sequence_keys, split_each

type Params = dict[str, Any]


@dataclass(frozen=True)
class Forms:
    """How a model computes what its configuration says. The parameters are the same in all forms."""

    compute: str = "float32"
    """The dtype of activations. Weights are cast to it where they are used."""
    remat: bool = False
    """Whether training computes the activations of each block again in the backward pass (`Block.__call__`)."""
    moe: type[MoE] = MoE
    """The class of the layers with experts."""
    attention: Implementation | None = None
    """The form of attention over whole sequences; None chooses by length (`causal_attention`)."""


PLAIN = Forms()


class DenseFFN(nnx.Module):
    """The dense baseline of an MoE layer: one feed-forward network that every token passes through."""

    def __init__(self, width: int, hidden: int, activation: Activation, out_scale: float, rngs: nnx.Rngs) -> None:
        self.experts = Experts(1, width, hidden, activation, out_scale, rngs)

    def __call__(self, x: Float[Array, "B T D"], mode: Mode, trace: bool = False) -> tuple[Float[Array, "B T D"], None]:
        del mode, trace  # every token goes through the same network in training, evaluation and decoding
        with jax.named_scope("experts"):
            return self.experts(x.reshape(1, -1, x.shape[-1])).reshape(x.shape), None


def build_layer(config: ModelConfig, rngs: nnx.Rngs, moe: type[MoE] = MoE, out_scale: float = 1.0) -> MoE:
    """An MoE layer of a model's shape and routing policy, with initial parameters."""
    return moe(
        config.width,
        config.expert_hidden,
        config.experts,
        config.routing,
        activation=config.activation,
        shared_experts=config.shared_experts,
        shared_gate=config.shared_gate,
        out_scale=out_scale,
        rngs=rngs,
    )


class Block(nnx.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, forms: Forms = PLAIN) -> None:
        # Each of the 2L branches adds to the residual stream. With this scale, the sum of all branches has the variance
        # of a single unscaled branch.
        out_scale = 0.0 if config.zero_init_residual else 1 / math.sqrt(2 * config.layers)
        self.dropout, self.multiplier = config.dropout, config.residual_multiplier
        self.attention_norm = Normalisation(config.norm, config.width, config.bias, config.norm_eps)
        self.attention = Attention(config, out_scale, rngs, forms.attention)
        self.ffn_norm = Normalisation(config.norm, config.width, config.bias, config.norm_eps)
        if config.dense == "none":
            self.ffn = build_layer(config, rngs, forms.moe, out_scale)
        else:
            self.ffn = DenseFFN(config.width, config.dense_hidden, config.activation, out_scale, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mode: Mode,
        keys: Key[Array, " B"] | None,
        remat: bool = False,
        trace: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, KeyValue]:
        """The output, the router's statistics, and the keys and values.

        With `remat` the backward pass recomputes the two halves of a block (attention, experts) one after the other. So
        only the activations of one half exist at a time. In return, the residual stream between the halves is kept. The
        routing decisions are kept, too.
        """
        # Three keys: dropout of attention weights, of the attention branch, of the expert branch.
        own = [None] * 3 if keys is None else split_each(keys, 3)

        def attend(block: Block, x: Array) -> tuple[Array, KeyValue]:
            with jax.named_scope("attention"):
                y, kv = block.attention(block.attention_norm(x), own[0])
            return _sum(x, block.scaled(dropout(y, block.dropout, own[1]))), kv

        def feed(block: Block, x: Array) -> tuple[Array, RouterStats | None]:
            with jax.named_scope("ffn"):
                y, stats = block.ffn(block.ffn_norm(x), mode, trace)
            return _sum(x, block.scaled(dropout(y, block.dropout, own[2]))), stats

        between, kv = (jax.checkpoint(attend) if remat else attend)(self, x)
        kept = jax.checkpoint_policies.save_only_these_names(DECISIONS)
        after, stats = (jax.checkpoint(feed, policy=kept) if remat else feed)(self, between)
        if stats is not None and stats.trace is not None:
            weights = self.attention.weights(self.attention_norm(x))
            stats = stats._replace(trace=stats.trace._replace(attention=weights))
        return after, stats, kv

    def decode(
        self, x: Float[Array, "B N D"], cache: KeyValue, index: Int[Array, "*B"], trace: bool = False
    ) -> tuple[Float[Array, "B N D"], RouterStats | None, KeyValue]:
        """The output for N tokens of each sequence, the router's statistics, and the cache that includes these tokens.

        `index` is one position for all sequences. Or it is one for each: they are then independent texts, and none
        changes the bits of another (`Mode.SERVE`). A text with a negative position has no token. Its output is NaN, and
        on a CPU its cache and its experts are not read.
        """
        y, cache = self.attention.decode(self.attention_norm(x), cache, index)
        x = x + self.scaled(y)
        y, stats = self.ffn(self.ffn_norm(x), Mode.SERVE if index.ndim else Mode.GENERATE, trace=trace)
        return x + self.scaled(y), stats, cache

    def scaled(self, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What attention or the experts add to the residual stream."""
        return branch if self.multiplier == 1 else branch * self.multiplier


def _sum(x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x + y, rounded to their dtype. Without the barrier XLA keeps a float32 copy of the sum beside a bfloat16 one, and
    each layer writes and reads both."""
    return jax.lax.optimization_barrier(x + y)


class Transformer(nnx.Module):
    """The language model.

    Parameters: embedding `[V, D]`, position `[T, D]` (learned positions), blocks, norm, head `[D, V]` (untied).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, forms: Forms = PLAIN) -> None:
        self.config = config
        self.compute = jnp.dtype(forms.compute)
        self.remat = forms.remat
        self.embedding = nnx.Param(embedding_init(rngs, (config.vocab_size, config.width)))
        if config.positions == "learned":
            self.position = nnx.Param(embedding_init(rngs, (config.seq_len, config.width)))
        self.blocks = nnx.List([Block(config, rngs, forms) for _ in range(config.layers)])
        self.norm = Normalisation(config.norm, config.width, config.bias, config.norm_eps)
        if not config.tied_head:
            self.head = nnx.Param(matrix_init(rngs, (config.width, config.vocab_size)))

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"] | None = None) -> Float[Array, "B T D"]:
        """The input of the first block. Unless `positions` are given, a sequence starts at position 0."""
        x = embedding_lookup(self.embedding[...], tokens)
        if self.config.scaled_embedding:  # Vaswani et al. 2017, section 3.4
            x = x * math.sqrt(self.config.width)
        if self.config.positions == "learned":
            # A slice, because its gradient is a plain sum. The gradient of indexing is a scatter-add.
            x = x + (self.position[: tokens.shape[1]] if positions is None else self.position[...][positions])
        x = x.astype(self.compute)
        return x if self.config.embedding_multiplier == 1 else x * self.config.embedding_multiplier

    def _final(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The normalised hidden states, whose products with the head are the logits."""
        x = self.norm(x)
        return x if self.config.logits_scaling == 1 else x / self.config.logits_scaling

    def __call__(
        self, tokens: Int[Array, "B T"], mode: Mode, key: Key[Array, "..."] | None = None, trace: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, list[KeyValue]]:
        """The normalised hidden states of all positions (for `logits`), the routers' statistics with a leading axis L
        (None for a dense baseline), and the keys and values of each layer.

        A key, or one key for each sequence, turns on dropout. `trace`, a static argument, adds every decision of the
        routers to their statistics. Without `trace` the compiled program contains no tracing.
        """
        keys = [None] * (len(self.blocks) + 1)
        config = self.config
        if key is not None and max(config.dropout, config.attention_dropout) > 0:
            keys = split_each(sequence_keys(key, len(tokens)), len(self.blocks) + 1)
        x = self._embed(tokens)
        x = dropout(x, config.dropout, keys[0])
        stats, cache = [], []
        for block, block_keys in zip(self.blocks, keys[1:], strict=True):
            x, layer_stats, kv = block(x, mode, block_keys, remat=self.remat and mode is Mode.TRAIN, trace=trace)
            stats.append(layer_stats)
            cache.append(kv)
        return self._final(x), _stacked(stats), cache

    def head_matrix(self) -> Float[Array, "D V"] | QuantizedMatrix:
        """The vocabulary head, which is the transposed embedding where they are tied."""
        if not self.config.tied_head:
            return self.head[...]
        table = self.embedding[...]
        return table if isinstance(table, QuantizedMatrix) else table.T  # a quantised table is transposed already

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Logits in at least float32. The factors have the compute dtype; products are summed in at least float32."""
        with jax.named_scope("head"):
            head = self.head_matrix()
            if isinstance(head, QuantizedMatrix):
                wide = at_least_float32(hidden.dtype)
                rows = quantized_matmul(hidden.reshape(-1, hidden.shape[-1]), head, wide)
                return rows.reshape(*hidden.shape[:-1], -1)
            return matmul_wide(hidden, head.astype(hidden.dtype))

    def empty_cache(self, batch: int, places: int) -> list[KeyValue]:
        """The keys and values of each layer, for `decode`, before any token."""
        config = self.config
        shape = (batch, config.key_value_heads, config.head_width, places)
        key = jnp.zeros(shape, self.compute)
        return [KeyValue(key, key.swapaxes(-1, -2)) for _ in self.blocks]

    def decode(
        self, token: Int[Array, " B"], cache: list[KeyValue], index: Int[Array, "*B"], trace: bool = False
    ) -> tuple[Float[Array, "B V"], RouterStats | None, list[KeyValue]]:
        """Logits after the token at position `index`, the routers' statistics as in a whole pass, and the cache that
        includes this token. `index` is one position for all sequences, or one for each (see `Block.decode`)."""
        hidden, stats, cache = self.extend(token[:, None], cache, index, trace)
        return self.logits(hidden[:, 0]), stats, cache

    def extend(
        self, tokens: Int[Array, "B N"], cache: list[KeyValue], index: Int[Array, "*B"], trace: bool = False
    ) -> tuple[Float[Array, "B N D"], RouterStats | None, list[KeyValue]]:
        """Append N tokens to each sequence, from position `index` on: the normalised hidden states (for `logits`), the
        routers' statistics, and the cache that includes these tokens. index + N must not exceed the cache's places."""
        x = self._embed(tokens, index[..., None] + jnp.arange(tokens.shape[1]))
        stats, new = [], []
        for block, kv in zip(self.blocks, cache, strict=True):
            x, layer_stats, kv = block.decode(x, kv, index, trace)
            stats.append(layer_stats)
            new.append(kv)
        return self._final(x), _stacked(stats), new


def _stacked(stats: list[RouterStats | None]) -> RouterStats | None:
    """The statistics of all layers, with a leading axis L. None for a dense baseline."""
    return None if stats[0] is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)


def create(config: ModelConfig, key: Key[Array, ""], forms: Forms = PLAIN) -> Transformer:
    """A model with initial parameters. Raises ValueError if `config.vocab_size` is not known."""
    if config.vocab_size < 1:
        raise ValueError("vocab_size is 0: take it from the tokenizer first (dataclasses.replace)")
    return Transformer(config, nnx.Rngs(params=key), forms)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The static definition, and the parameters as a pure nested dict."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> Transformer:
    """The inverse of `split`."""
    return nnx.merge(graphdef, nnx.State(jax.tree.map(lambda x: x, params)))


def abstract_model(
    config: ModelConfig, forms: Forms = PLAIN, param_dtype: ParamDtype = "float32"
) -> tuple[nnx.GraphDef, Params]:
    """The static definition of a model, and the shapes of its parameters as they are stored. Allocates nothing."""
    model = nnx.eval_shape(lambda: create(config, jax.random.key(0), forms))
    graphdef, shapes = split(model)
    return graphdef, jax.eval_shape(lambda params: to_param_dtype(params, param_dtype), shapes)


def abstract_adapted(config: ModelConfig, lora: LoraShape, forms: Forms = PLAIN) -> tuple[nnx.GraphDef, Adapters]:
    """The static definition of a model with adapters, and the shapes of the adapters. Allocates nothing."""

    def make() -> Transformer:
        model = create(config, jax.random.key(0), forms)
        add_adapters(model, lora)
        return model

    graphdef, shapes = split(nnx.eval_shape(make))
    return graphdef, adapters_in(shapes)
