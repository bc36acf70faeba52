"""The choice between cuDNN's attention, by NVIDIA's library, and this project's own form.

cuDNN computes attention block by block and keeps no weights in memory (Dao et al. 2022, "FlashAttention").
`jax.nn.dot_product_attention` calls it, without dropout of attention weights. The order of its sums, and so the last
bits of a gradient, may change from run to run.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from moe_jax.config import ExecutionConfig, ModelConfig
from moe_jax.model.kernels.causal_attention import Implementation, causal_attention
from moe_jax.model.precision import Card

MOST_HEAD_WIDTH = 128
"""cuDNN's bound before compute capability 9.0. There must be a multiple of 8 numbers."""


@dataclass(frozen=True)
class AttentionForm:
    """Which form of attention a training step has, and the reason for it, which is printed."""

    implementation: Implementation | None
    """None: the form that `causal_attention` chooses."""
    reason: str
    """"" where there is nothing to choose: on anything else than an NVIDIA card."""


def choose_attention(
    model: ModelConfig, execution: ExecutionConfig, compute: str, card: Card, here: bool, devices: int = 1
) -> AttentionForm:
    """The form for training on `devices` cards. `here`: the card is in this machine, and cuDNN is tried on it."""
    if card.capability is None:
        return AttentionForm(None, "")
    needs = {
        "needs compute capability 8.0 or more": card.capability >= 8.0,
        "needs bfloat16 or float16": compute != "float32",
        "has no dropout of attention weights": model.attention_dropout == 0,
        f"takes heads of a multiple of 8 numbers, up to {MOST_HEAD_WIDTH}": model.head_width % 8 == 0
        and model.head_width <= MOST_HEAD_WIDTH,
        "may change the last bits from run to run, and --deterministic is given": not execution.deterministic,
        "is taken on one device only": devices == 1,
    }
    for need, met in needs.items():
        if not met:
            return AttentionForm(None, f"this project's own form, because cuDNN's {need}")
    if here and (error := failure((model.heads, model.key_value_heads, model.seq_len, model.head_width), compute)):
        return AttentionForm(None, f"this project's own form, because cuDNN's fails here ({error})")
    return AttentionForm("cudnn", "cuDNN's; --deterministic takes this project's own form")


@cache
def failure(shape: tuple[int, int, int, int], compute: str) -> str:
    """What goes wrong in one forward and backward pass of cuDNN's attention on the first device, such as that cuDNN is
    not installed. "" if nothing does. The shape has H, KV, T and A."""
    heads, key_heads, positions, width = shape
    query, key = (jnp.ones((1, h, positions, width), compute) for h in (heads, key_heads))

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return causal_attention(query, key, value, implementation="cudnn").astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, key))
    except Exception as error:  # whatever the library or the compiler does not like: training goes on without it
        return str(error).strip().partition("\n")[0][:120]
    return ""
