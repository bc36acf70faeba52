"""Causal attention by cuDNN, NVIDIA's library, and the choice between it and this project's own form.

cuDNN computes attention block by block and keeps no weights in memory (Dao et al. 2022, "FlashAttention").
`jax.nn.dot_product_attention` calls it, without dropout of attention weights. The order of its sums, and so the last
bits of a gradient, may change from run to run.

A training step takes cuDNN's form where `choose_attention` allows it. On a card of this machine both forms are compared
once, before the first step. If cuDNN fails or is less exact, the own form stays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.config import ExecutionConfig, ModelConfig
from moe_jax.model.kernels.causal_attention import Implementation, causal_attention
from moe_jax.model.precision import Card

MOST_HEAD_WIDTH = 128
"""cuDNN's bound before compute capability 9.0. There must be a multiple of 8 numbers."""
COMPARED_POSITIONS = 256
"""Positions of the comparison, at most."""
LESS_EXACT = 3.0
"""cuDNN's largest error may be this many times that of the own form. Both forms round weights and their gradients to
the compute dtype, but not at the same places."""

_by_cudnn = partial(causal_attention, implementation="cudnn")
_reference = partial(causal_attention, implementation="reference")
Attend = Callable[[Array, Array, Array], Array]
"""(query [B, H, T, A], key [B, KV, T, A], value [B, KV, T, A]) -> [B, H, T, A]."""


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
    """The form for training on `devices` cards. `here`: the card is in this machine, and can be asked."""
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
    if not here:
        return AttentionForm("cudnn", "cuDNN's")
    shape = model.heads, model.key_value_heads, min(model.seq_len, COMPARED_POSITIONS), model.head_width
    if why := problem(shape, compute):
        return AttentionForm(None, f"this project's own form, because {why}")
    return AttentionForm("cudnn", "cuDNN's, compared with this project's own form before the first step")


@cache
def problem(shape: tuple[int, int, int, int], compute: str) -> str:
    """Why cuDNN's attention must not be used on the first device: it is not installed, it fails, or it is not exact.
    "" if nothing is wrong. The shape has H, KV, T and A."""
    try:
        worst = worst_error(_by_cudnn, shape, compute)
    except Exception as error:  # whatever the library or the compiler does not like: training goes on without it
        return f"cuDNN's fails here ({str(error).strip().partition(chr(10))[0][:120]})"
    if not worst <= LESS_EXACT:
        return f"cuDNN's largest error is {worst:.3g} times as large"
    return ""


def worst_error(attend: Attend, shape: tuple[int, int, int, int], compute: str) -> float:
    """The largest error of `attend` in its output and its three gradients, over that of the own form, with random
    numbers. The shape has H, KV, T and A. NaN if a result is not finite.

    Errors are differences from the reference in float32.
    """
    heads, key_heads, positions, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(1, h, positions, width) for h in (heads, key_heads, key_heads, heads)]
    operands = [jax.random.normal(key, size).astype(compute) for key, size in zip(keys, sizes, strict=True)]

    def results(attend: Attend, *operands: Array) -> list[Array]:
        out, gradients = jax.vjp(attend, *operands[:3])
        return [x.astype(jnp.float32) for x in (out, *gradients(operands[3]))]

    run = jax.jit(results, static_argnums=0)
    exact = run(_reference, *(x.astype(jnp.float32) for x in operands))
    errors = [
        jnp.stack([jnp.abs(x - y).max() for x, y in zip(run(form, *operands), exact, strict=True)])
        for form in (attend, causal_attention)
    ]
    return float((errors[0] / errors[1]).max())
