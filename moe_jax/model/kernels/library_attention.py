"""The choice between cuDNN's attention, by NVIDIA's library, and this project's own form.

cuDNN computes attention block by block and keeps no weights in memory (Dao et al. 2022, "FlashAttention").
`jax.nn.dot_product_attention` calls it, without dropout of attention weights. The order of its sums, and so the last
bits of a gradient, may change from run to run.
"""

from dataclasses import dataclass

from moe_jax.config import ExecutionConfig, ModelConfig
from moe_jax.model.kernels.causal_attention import Implementation
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
    model: ModelConfig, execution: ExecutionConfig, compute: str, card: Card, devices: int = 1
) -> AttentionForm:
    """The form for training on `devices` cards."""
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
    return AttentionForm("cudnn", "cuDNN's; --deterministic takes this project's own form")
