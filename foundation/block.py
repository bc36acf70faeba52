"""The pre-norm residual block:  a = x + drop(attention(norm1(x))),  y = a + drop(moe(norm2(a))).

A sum passes its gradient to both terms unchanged. So d_y reaches a twice, straight through the residual
stream and through the branch, and d_a = d_y + (what comes back through the branch): the "+" of the forward
pass is a "+" of gradients. The straight path has no factor in it, which is why deep residual networks
train.

Sources: He et al. 2016 (identity mappings), equations 4 and 5; pre-norm order: Radford et al. 2019, section
2.3.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from foundation.attention import MultiHeadCache, multi_head_backward, multi_head_forward
from foundation.dropout import dropout_backward, dropout_forward
from foundation.moe import MoECache, MoEOutput, Scalar, moe_backward, moe_forward
from foundation.norms import (
    LAYERNORM_EPS,
    RMSNORM_EPS,
    layernorm_backward,
    layernorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)
from foundation.positions import ROPE_BASE

Stream = Float[Array, "B T D"]


@dataclass(frozen=True)
class ModelConfig:
    """What the shapes of the parameters do not say. The rest (layers, experts, biases, SwiGLU, learned
    positions, tied head, key heads, width of a head, normalised queries) follows from which parameters there
    are."""

    heads: int = 2
    """H, attention heads."""
    top_k: int = 2
    """K, experts per token."""
    capacity_factor: float = 1.25
    """Slots of an expert over its fair share."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Which normalisation: with a scale alone the parameters do not tell."""
    norm_eps: float | None = None
    """Added to the variance or mean square; None is LayerNorm's 1e-5 and RMSNorm's 1e-6."""
    rotary: bool = True
    """RoPE in every attention layer."""
    rope_base: float = ROPE_BASE
    """Base of the rotation's frequencies."""
    rope_slowed: tuple[float, ...] = (1.0,)
    """What the frequency of each pair is multiplied by (`positions.slowed_pairs`); one number is for all."""
    renormalise_gates: bool = True
    """Divide the gates of a token by their sum."""
    dropout: float = 0.0
    """Rate of all dropouts; used where masks are given."""
    balance_coef: float = 0.01
    """Weight of the balance loss in the training loss."""
    z_coef: float = 1e-3
    """Weight of the z-loss in the training loss."""


class BlockCache(NamedTuple):
    """The caches of the steps in order."""

    norm1: tuple
    attention: MultiHeadCache
    drop1: tuple
    norm2: tuple
    moe: MoECache
    drop2: tuple


def norm_forward(x: Stream, params: dict, kind: str, eps: float | None = None) -> tuple[Stream, tuple]:
    """LayerNorm or RMSNorm with params {"scale" [D], "bias"? [D]}."""
    if kind == "rmsnorm":
        return rmsnorm_forward(x, params["scale"], eps or RMSNORM_EPS)
    return layernorm_forward(x, params["scale"], params.get("bias"), eps or LAYERNORM_EPS)


def norm_backward(d_y: Stream, cache: tuple, kind: str) -> tuple[Stream, dict]:
    """(d_x, d_params)."""
    if kind == "rmsnorm":
        d_x, d_scale = rmsnorm_backward(d_y, cache)
        return d_x, {"scale": d_scale}
    d_x, d_scale, d_bias = layernorm_backward(d_y, cache)
    return d_x, {"scale": d_scale} if d_bias is None else {"scale": d_scale, "bias": d_bias}


def block_forward(
    x: Stream, params: dict, config: ModelConfig, masks: dict | None = None
) -> tuple[MoEOutput, BlockCache]:
    """One block; the output's `y` is the stream, its losses are those of this layer's router.

    params: {"norm1", "attention", "norm2", "moe"}, see `norm_forward`, `multi_head_forward` and
    `moe_forward`.
    masks: {"weights" [B, H, T, T], "attention" [B, T, D], "moe" [B, T, D]}, True where kept; None: no
    dropout.
    """
    masks = masks or {}
    n1, norm1_cache = norm_forward(x, params["norm1"], config.norm, config.norm_eps)
    attended, attention_cache = multi_head_forward(
        n1,
        params["attention"],
        config.heads,
        config.rotary,
        masks.get("weights"),
        config.dropout,
        config.rope_base,
        config.norm_eps or RMSNORM_EPS,
        jnp.asarray(config.rope_slowed),
    )
    branch1, drop1_cache = dropout_forward(attended, masks.get("attention"), config.dropout)
    a = x + branch1

    n2, norm2_cache = norm_forward(a, params["norm2"], config.norm, config.norm_eps)
    mixed, moe_cache = moe_forward(n2, params["moe"], config.top_k, config.capacity_factor, config.renormalise_gates)
    branch2, drop2_cache = dropout_forward(mixed.y, masks.get("moe"), config.dropout)
    cache = BlockCache(norm1_cache, attention_cache, drop1_cache, norm2_cache, moe_cache, drop2_cache)
    return mixed._replace(y=a + branch2), cache


def block_backward(
    d_y: Stream, d_balance: Scalar, d_z: Scalar, cache: BlockCache, config: ModelConfig
) -> tuple[Stream, dict]:
    """(d_x, d_params)."""
    d_mixed = dropout_backward(d_y, cache.drop2)
    d_n2, d_moe = moe_backward(d_mixed, d_balance, d_z, cache.moe)
    d_a_branch, d_norm2 = norm_backward(d_n2, cache.norm2, config.norm)
    d_a = d_y + d_a_branch

    d_attended = dropout_backward(d_a, cache.drop1)
    d_n1, d_attention = multi_head_backward(d_attended, cache.attention)
    d_x_branch, d_norm1 = norm_backward(d_n1, cache.norm1, config.norm)
    d_x = d_a + d_x_branch
    return d_x, {"norm1": d_norm1, "attention": d_attention, "norm2": d_norm2, "moe": d_moe}
