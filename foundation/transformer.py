"""The whole mixture-of-experts language model, and the gradient of its training loss.

    x = embedding[tokens] (+ positions)      then dropout
    x = block_l(x)                           for each layer l
    logits = norm(x) head                    head: [D, V], or the transposed embedding
    loss = cross-entropy + balance_coef * mean_l balance_l + z_coef * mean_l z_l

Nothing new is derived in this file: it is the chain rule as bookkeeping. Forward, each step leaves its
cache; the backward pass takes the caches in reverse order. Two places need a thought. Every layer's
auxiliary losses are in the total with weight coef / L, so that constant enters at every layer's router. And
a tied table is read at both ends of the model, so its gradient is the sum of the head's and the lookup's.

Sources: as named in each part; the model is the decoder-only one of Radford et al. 2019 with the layer of
Fedus, Zoph and Shazeer 2021 in place of every feed-forward network.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foundation.block import (
    BlockCache,
    ModelConfig,
    block_backward,
    block_forward,
    norm_backward,
    norm_forward,
)
from foundation.dropout import dropout_backward, dropout_forward
from foundation.embedding import embedding_backward, embedding_forward, tied_head_backward, tied_head_forward
from foundation.initializers import normal, residual_scaled
from foundation.linear import linear_backward, linear_forward
from foundation.losses import cross_entropy_backward, cross_entropy_forward
from foundation.moe import Scalar
from foundation.positions import learned_positions_backward, learned_positions_forward


class ModelOutput(NamedTuple):
    """logits [B, T, V]; balance loss and z-loss, each the mean over layers; dropped share (no gradient)."""

    logits: Array
    balance: Array
    z: Array
    dropped: Array


class ModelCache(NamedTuple):
    """The caches of the steps in order; `positions` is None without a learned table; `head` is None where
    tied."""

    embedding: tuple
    positions: tuple | None
    dropout: tuple
    blocks: list[BlockCache]
    norm: tuple
    tied: bool
    head: tuple


def model_forward(
    params: dict, tokens: Int[Array, "B T"], config: ModelConfig, masks: dict | None = None
) -> tuple[ModelOutput, ModelCache]:
    """Logits and auxiliary losses.

    params: {"embedding" [V, D], "positions"? [N, D], "blocks": [block, ...], "norm", "head"? [D, V]}.
    masks: {"embedding" [B, T, D], "blocks": [see `block_forward`, ...]}; None: no dropout.
    """
    x, embedding_cache = embedding_forward(params["embedding"], tokens)
    positions_cache = None
    if "positions" in params:
        x, positions_cache = learned_positions_forward(x, params["positions"])
    x, dropout_cache = dropout_forward(x, masks["embedding"] if masks else None, config.dropout)

    block_caches, balances, zs, drops = [], [], [], []
    for layer, block in enumerate(params["blocks"]):
        output, cache = block_forward(x, block, config, masks["blocks"][layer] if masks else None)
        x = output.y
        block_caches.append(cache)
        balances.append(output.balance)
        zs.append(output.z)
        drops.append(output.dropped)

    x, norm_cache = norm_forward(x, params["norm"], config.norm, config.norm_eps)
    tied = "head" not in params
    if tied:
        logits, head_cache = tied_head_forward(x, params["embedding"])
    else:
        logits, head_cache = linear_forward(x, params["head"])
    balance, z, dropped = (jnp.mean(jnp.stack(parts)) for parts in (balances, zs, drops))
    cache = ModelCache(embedding_cache, positions_cache, dropout_cache, block_caches, norm_cache, tied, head_cache)
    return ModelOutput(logits, balance, z, dropped), cache


def model_backward(
    d_logits: Float[Array, "B T V"], d_balance: Scalar, d_z: Scalar, cache: ModelCache, config: ModelConfig
) -> dict:
    """d_params, a tree like `params`."""
    grads: dict = {}
    if cache.tied:
        d_x, d_table_head = tied_head_backward(d_logits, cache.head)
    else:
        d_x, grads["head"], _ = linear_backward(d_logits, cache.head)
        d_table_head = None
    d_x, grads["norm"] = norm_backward(d_x, cache.norm, config.norm)

    layers = len(cache.blocks)  # each layer's loss is in the mean over layers with weight 1 / L
    d_blocks = []
    for block_cache in reversed(cache.blocks):
        d_x, d_block = block_backward(d_x, d_balance / layers, d_z / layers, block_cache, config)
        d_blocks.append(d_block)
    grads["blocks"] = d_blocks[::-1]

    d_x = dropout_backward(d_x, cache.dropout)
    if cache.positions is not None:
        d_x, grads["positions"] = learned_positions_backward(d_x, cache.positions)
    grads["embedding"] = embedding_backward(d_x, cache.embedding)
    if d_table_head is not None:
        grads["embedding"] = grads["embedding"] + d_table_head
    return grads


class LossCache(NamedTuple):
    """The caches of the model and of the cross-entropy."""

    model: ModelCache
    cross_entropy: tuple


def loss_forward(
    params: dict,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    config: ModelConfig,
    masks: dict | None = None,
) -> tuple[Scalar, LossCache]:
    """The training loss, in nats per counted token, auxiliary losses included."""
    output, model_cache = model_forward(params, tokens, config, masks)
    nats, cross_entropy_cache = cross_entropy_forward(output.logits, targets)
    total = nats + config.balance_coef * output.balance + config.z_coef * output.z
    return total, LossCache(model_cache, cross_entropy_cache)


def loss_backward(d_loss: Scalar, cache: LossCache, config: ModelConfig) -> dict:
    """d_params: the gradient of the training loss, by hand."""
    d_logits = cross_entropy_backward(d_loss, cache.cross_entropy)
    return model_backward(d_logits, config.balance_coef * d_loss, config.z_coef * d_loss, cache.model, config)


def loss_and_gradient(
    params: dict,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    config: ModelConfig,
    masks: dict | None = None,
) -> tuple[Scalar, dict]:
    """(loss, d_params): what one training step needs."""
    loss, cache = loss_forward(params, tokens, targets, config, masks)
    return loss, loss_backward(jnp.ones_like(loss), cache, config)


class ModelSize(NamedTuple):
    """The shapes of a model that `init_params` makes. `longest` 0 makes no learned position table; `kv_heads` 0
    makes as many key heads as heads, `head_width` 0 heads of width D / H; `qk_norm` is none, head or full."""

    vocabulary: int
    width: int
    layers: int
    experts: int
    hidden: int
    longest: int = 0
    swiglu: bool = True
    bias: bool = False
    tied: bool = True
    kv_heads: int = 0
    head_width: int = 0
    qk_norm: str = "none"


def init_params(key: Array, size: ModelSize, config: ModelConfig, std: float = 0.02) -> dict:
    """Parameters as GPT-2 starts them: normal(std), the two output projections of a block scaled by
    1/sqrt(2L)."""
    width, hidden, experts = size.width, size.hidden, size.experts
    key, embedding_key, positions_key, head_key = jax.random.split(key, 4)
    params: dict = {"embedding": normal(embedding_key, (size.vocabulary, width), std)}
    if size.longest:
        params["positions"] = normal(positions_key, (size.longest, width), std)
    if not size.tied:
        params["head"] = normal(head_key, (width, size.vocabulary), std)
    params["norm"] = _norm_params(width, size.bias and config.norm == "layernorm")
    params["blocks"] = []
    for layer_key in jax.random.split(key, size.layers):
        qkv_key, out_key, router_key, gate_key, in_key, expert_out_key = jax.random.split(layer_key, 6)
        attention = _attention_params(qkv_key, out_key, size, config.heads, std)
        moe = {
            "router": normal(router_key, (width, experts), std),
            "w_in": normal(in_key, (experts, width, hidden), std),
            "w_out": residual_scaled(expert_out_key, (experts, hidden, width), size.layers, std),
        }
        if size.swiglu:
            moe["w_gate"] = normal(gate_key, (experts, width, hidden), std)
        norms = [_norm_params(width, size.bias and config.norm == "layernorm") for _ in range(2)]
        params["blocks"].append({"norm1": norms[0], "attention": attention, "norm2": norms[1], "moe": moe})
    return params


def _attention_params(qkv_key: Array, out_key: Array, size: ModelSize, heads: int, std: float) -> dict:
    head_width = size.head_width or size.width // heads
    queries, keys = heads * head_width, (size.kv_heads or heads) * head_width
    params: dict = {
        "qkv": {"kernel": normal(qkv_key, (size.width, queries + 2 * keys), std)},
        "out": {"kernel": residual_scaled(out_key, (queries, size.width), size.layers, std)},
    }
    if size.bias:
        params["qkv"]["bias"] = jnp.zeros(queries + 2 * keys)
        params["out"]["bias"] = jnp.zeros(size.width)
    if size.qk_norm != "none":
        widths = (queries, keys) if size.qk_norm == "full" else (head_width, head_width)
        params["query_norm"], params["key_norm"] = (_norm_params(width, bias=False) for width in widths)
    return params


def _norm_params(width: int, bias: bool) -> dict:
    scale = {"scale": jnp.ones(width)}
    return {**scale, "bias": jnp.zeros(width)} if bias else scale
