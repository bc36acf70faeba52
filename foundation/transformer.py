"""The whole mixture-of-experts language model, and the gradient of its training loss. Derived in chapters 7 and 9.

    x = embedding[tokens] (+ positions)      then dropout
    a = x + drop(attention(norm1(x)))        for each layer l
    x = a + drop(moe(norm2(a)))
    logits = norm(x) head                    head: [D, V], or the transposed embedding
    loss = cross-entropy + balance_coef * mean_l balance_l + z_coef * mean_l z_l

Backward, the caches are taken in reverse order. A sum passes its gradient to both terms, each layer's auxiliary losses
have the weight coef / L, and a tied table is read at both ends, so its gradient is a sum.

Sources: the decoder of Radford et al. 2019, section 2.3 (the norm before the branch), with the layer of Fedus, Zoph and
Shazeer 2021 in place of every feed-forward network; He et al. 2016 (identity mappings), equations 4 and 5.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foundation import norms
from foundation.attention import multi_head_backward, multi_head_forward
from foundation.dropout import dropout_backward, dropout_forward
from foundation.embedding import embedding_backward, embedding_forward
from foundation.initializers import normal, residual_scaled
from foundation.linear import linear_backward, linear_forward
from foundation.losses import cross_entropy_backward, cross_entropy_forward
from foundation.moe import MoEOutput, Scalar, moe_backward, moe_forward
from foundation.positions import ROPE_BASE, learned_positions_backward, learned_positions_forward

Stream = Float[Array, "B T D"]
Tokens = Int[Array, "B T"]


@dataclass(frozen=True)
class ModelConfig:
    """What the parameters do not say. The rest (layers, experts, biases, SwiGLU, learned positions, tied head, key
    heads, width of a head, normalised queries) follows from their names and shapes."""

    heads: int = 2
    top_k: int = 2
    capacity_factor: float = 1.25
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float | None = None  # None is LayerNorm's 1e-5 and RMSNorm's 1e-6
    rotary: bool = True
    rope_base: float = ROPE_BASE
    rope_slowed: tuple[float, ...] = (1.0,)  # what the frequency of each pair is multiplied by; one number is for all
    renormalise_gates: bool = True
    dropout: float = 0.0  # where masks are given
    balance_coef: float = 0.01
    z_coef: float = 1e-3


def norm_forward(x: Stream, params: dict, config: ModelConfig) -> tuple[Stream, tuple]:
    """LayerNorm or RMSNorm with params {"scale" [D], "bias"? [D]}."""
    if config.norm == "rmsnorm":
        return norms.rmsnorm_forward(x, params["scale"], config.norm_eps or norms.RMSNORM_EPS)
    return norms.layernorm_forward(x, params["scale"], params.get("bias"), config.norm_eps or norms.LAYERNORM_EPS)


def norm_backward(d_y: Stream, cache: tuple, config: ModelConfig) -> tuple[Stream, dict]:
    """(d_x, d_params)."""
    if config.norm == "rmsnorm":
        d_x, d_scale = norms.rmsnorm_backward(d_y, cache)
        return d_x, {"scale": d_scale}
    d_x, d_scale, d_bias = norms.layernorm_backward(d_y, cache)
    return d_x, {"scale": d_scale} if d_bias is None else {"scale": d_scale, "bias": d_bias}


def block_forward(x: Stream, params: dict, config: ModelConfig, masks: dict | None = None) -> tuple[MoEOutput, tuple]:
    """One block; the output's `y` is the stream, its losses are those of this layer's router.

    params: {"norm1", "attention", "norm2", "moe"}, see `norm_forward`, `multi_head_forward` and `moe_forward`.
    masks: {"weights" [B, H, T, T], "attention" [B, T, D], "moe" [B, T, D]}, True where kept; None: no dropout.
    """
    masks, rate = masks or {}, config.dropout
    n1, norm1_cache = norm_forward(x, params["norm1"], config)
    settings = config.rope_base, config.norm_eps or norms.RMSNORM_EPS, jnp.asarray(config.rope_slowed)
    attended, attention_cache = multi_head_forward(
        n1, params["attention"], config.heads, config.rotary, masks.get("weights"), rate, *settings
    )
    branch1, drop1_cache = dropout_forward(attended, masks.get("attention"), rate)
    a = x + branch1

    n2, norm2_cache = norm_forward(a, params["norm2"], config)
    mixed, moe_cache = moe_forward(n2, params["moe"], config.top_k, config.capacity_factor, config.renormalise_gates)
    branch2, drop2_cache = dropout_forward(mixed.y, masks.get("moe"), rate)
    cache = (norm1_cache, attention_cache, drop1_cache, norm2_cache, moe_cache, drop2_cache)
    return mixed._replace(y=a + branch2), cache


def block_backward(
    d_y: Stream, d_balance: Scalar, d_z: Scalar, cache: tuple, config: ModelConfig
) -> tuple[Stream, dict]:
    """(d_x, d_params)."""
    norm1_cache, attention_cache, drop1_cache, norm2_cache, moe_cache, drop2_cache = cache
    d_mixed = dropout_backward(d_y, drop2_cache)
    d_n2, d_moe = moe_backward(d_mixed, d_balance, d_z, moe_cache)
    d_a_branch, d_norm2 = norm_backward(d_n2, norm2_cache, config)
    d_a = d_y + d_a_branch

    d_attended = dropout_backward(d_a, drop1_cache)
    d_n1, d_attention = multi_head_backward(d_attended, attention_cache)
    d_x_branch, d_norm1 = norm_backward(d_n1, norm1_cache, config)
    return d_a + d_x_branch, {"norm1": d_norm1, "attention": d_attention, "norm2": d_norm2, "moe": d_moe}


class ModelOutput(NamedTuple):
    """logits [B, T, V]; balance loss and z-loss, each the mean over layers; dropped share (no gradient)."""

    logits: Array
    balance: Array
    z: Array
    dropped: Array


def model_forward(
    params: dict, tokens: Tokens, config: ModelConfig, masks: dict | None = None
) -> tuple[ModelOutput, tuple]:
    """Logits and auxiliary losses.

    params: {"embedding" [V, D], "positions"? [N, D], "blocks": [block, ...], "norm", "head"? [D, V]}.
    masks: {"embedding" [B, T, D], "blocks": [see `block_forward`, ...]}; None: no dropout.
    """
    masks = masks or {"embedding": None, "blocks": [None] * len(params["blocks"])}
    x, embedding_cache = embedding_forward(params["embedding"], tokens)
    positions_cache = None
    if "positions" in params:
        x, positions_cache = learned_positions_forward(x, params["positions"])
    x, dropout_cache = dropout_forward(x, masks["embedding"], config.dropout)

    losses, block_caches = [], []
    for block, block_masks in zip(params["blocks"], masks["blocks"], strict=True):
        (x, *of_layer), block_cache = block_forward(x, block, config, block_masks)
        losses.append(jnp.stack(of_layer))
        block_caches.append(block_cache)

    x, norm_cache = norm_forward(x, params["norm"], config)
    tied = "head" not in params
    logits, head_cache = linear_forward(x, params["embedding"].T if tied else params["head"])
    balance, z, dropped = jnp.mean(jnp.stack(losses), axis=0)
    cache = (embedding_cache, positions_cache, dropout_cache, block_caches, norm_cache, tied, head_cache)
    return ModelOutput(logits, balance, z, dropped), cache


def model_backward(
    d_logits: Float[Array, "B T V"], d_balance: Scalar, d_z: Scalar, cache: tuple, config: ModelConfig
) -> dict:
    """d_params, a tree like `params`."""
    embedding_cache, positions_cache, dropout_cache, block_caches, norm_cache, tied, head_cache = cache
    grads: dict = {}
    d_x, d_head, _ = linear_backward(d_logits, head_cache)
    d_x, grads["norm"] = norm_backward(d_x, norm_cache, config)

    layers = len(block_caches)  # each layer's loss is in the mean over layers with weight 1 / L
    d_blocks = []
    for block_cache in reversed(block_caches):
        d_x, d_block = block_backward(d_x, d_balance / layers, d_z / layers, block_cache, config)
        d_blocks.append(d_block)
    grads["blocks"] = d_blocks[::-1]

    d_x = dropout_backward(d_x, dropout_cache)
    if positions_cache is not None:
        d_x, grads["positions"] = learned_positions_backward(d_x, positions_cache)
    grads["embedding"] = embedding_backward(d_x, embedding_cache)
    if tied:
        grads["embedding"] = grads["embedding"] + d_head.T
    else:
        grads["head"] = d_head
    return grads


def loss_forward(
    params: dict, tokens: Tokens, targets: Tokens, config: ModelConfig, masks: dict | None = None
) -> tuple[Scalar, tuple]:
    """The training loss, in nats per counted token, auxiliary losses included."""
    output, model_cache = model_forward(params, tokens, config, masks)
    nats, cross_entropy_cache = cross_entropy_forward(output.logits, targets)
    total = nats + config.balance_coef * output.balance + config.z_coef * output.z
    return total, (model_cache, cross_entropy_cache)


def loss_backward(d_loss: Scalar, cache: tuple, config: ModelConfig) -> dict:
    """d_params: the gradient of the training loss, by hand."""
    model_cache, cross_entropy_cache = cache
    d_logits = cross_entropy_backward(d_loss, cross_entropy_cache)
    return model_backward(d_logits, config.balance_coef * d_loss, config.z_coef * d_loss, model_cache, config)


def loss_and_gradient(
    params: dict, tokens: Tokens, targets: Tokens, config: ModelConfig, masks: dict | None = None
) -> tuple[Scalar, dict]:
    """(loss, d_params): what one training step needs."""
    loss, cache = loss_forward(params, tokens, targets, config, masks)
    return loss, loss_backward(jnp.ones_like(loss), cache, config)


class ModelSize(NamedTuple):
    """The shapes of a model that `init_params` makes."""

    vocabulary: int
    width: int
    layers: int
    experts: int
    hidden: int


def init_params(key: Array, size: ModelSize, std: float = 0.02) -> dict:
    """RMSNorm, SwiGLU and a tied table, as GPT-2 starts them: normal(std), the two output projections of a block scaled
    by 1/sqrt(2L)."""
    vocabulary, width, layers, experts, hidden = size
    ones = {"scale": jnp.ones(width)}
    key, table_key = jax.random.split(key)
    blocks = []
    for block_key in jax.random.split(key, layers):
        qkv_key, out_key, router_key, gate_key, in_key, last_key = jax.random.split(block_key, 6)
        attention = {
            "qkv": {"kernel": normal(qkv_key, (width, 3 * width), std)},
            "out": {"kernel": residual_scaled(out_key, (width, width), layers, std)},
        }
        moe = {
            "router": normal(router_key, (width, experts), std),
            "w_gate": normal(gate_key, (experts, width, hidden), std),
            "w_in": normal(in_key, (experts, width, hidden), std),
            "w_out": residual_scaled(last_key, (experts, hidden, width), layers, std),
        }
        blocks.append({"norm1": ones, "attention": attention, "norm2": ones, "moe": moe})
    return {"embedding": normal(table_key, (vocabulary, width), std), "blocks": blocks, "norm": ones}
