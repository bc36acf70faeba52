"""The choice between cuDNN's attention, by NVIDIA's library, and this project's own form.

cuDNN computes attention block by block and keeps no weights in memory (Dao et al. 2022, "FlashAttention").
`jax.nn.dot_product_attention` calls it, without dropout of attention weights. The order of its sums, and so the last
bits of a gradient, may change from run to run.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExecutionConfig, ModelConfig
from moe_jax.model.kernels.causal_attention import Implementation, causal_attention
from moe_jax.model.precision import Card

MOST_HEAD_WIDTH = 128
"""cuDNN's bound before compute capability 9.0. There must be a multiple of 8 numbers."""
MOST_ERROR = 3
"""How many times the error of the own form cuDNN's may be. Both round to the same 16 bits."""


@dataclass(frozen=True)
class AttentionForm:
    """Which form of attention a training step has, and the reason for it, which is printed."""

    implementation: Implementation | None
    """None: the form that `causal_attention` chooses."""
    reason: str
    """"" where there is nothing to choose: on anything else than an NVIDIA card."""


def choose_attention(
    model: ModelConfig, execution: ExecutionConfig, compute: str, card: Card, here: bool, batch: int, devices: int = 1
) -> AttentionForm:
    """The form for training on `devices` cards with micro-batches of `batch` sequences. `here`: the card is in this
    machine, and cuDNN is tried on it."""
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
    shape = (batch, model.heads, model.key_value_heads, model.seq_len, model.head_width)
    if here and (error := failure(shape, compute)):
        return AttentionForm(None, f"this project's own form, because cuDNN's fails here ({error})")
    return AttentionForm("cudnn", "cuDNN's; --deterministic takes this project's own form")


@cache
def failure(shape: tuple[int, int, int, int, int], compute: str) -> str:
    """What is wrong with cuDNN's attention on the first device: it is not installed or raises an error, or its output
    or a gradient is further from the exact one, in its norm, than MOST_ERROR times the own form's. "" if nothing is.

    The shape has B, H, KV, T and A. Exact is the own form in float32.
    """
    batch, heads, key_heads, positions, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(batch, h, positions, width) for h in (heads, key_heads, key_heads, heads)]
    operands = [jax.random.normal(key, size).astype(compute) for key, size in zip(keys, sizes, strict=True)]

    @partial(jax.jit, static_argnums=0)
    def results(implementation: Implementation | None, *operands: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(partial(causal_attention, implementation=implementation), *operands[:3])
        return [x.astype(jnp.float32) for x in (out, *pull(operands[3]))]

    def own(*operands: jax.Array) -> list[jax.Array]:  # it keeps weights, so one sequence after another
        of_one = jax.lax.map(lambda one: results(None, *(x[None] for x in one)), operands)
        return [x[:, 0] for x in of_one]

    try:
        exact = own(*(x.astype(jnp.float32) for x in operands))
        errors = [
            [float(np.linalg.norm(np.asarray(got - true))) for got, true in zip(form(*operands), exact, strict=True)]
            for form in (partial(results, "cudnn"), own)
        ]
    except Exception as error:  # whatever the library or the compiler does not like: training goes on without it
        return str(error).strip().partition("\n")[0][:120]
    names = ("output", "gradient of the query", "gradient of the key", "gradient of the value")
    for name, error, usual in zip(names, *errors, strict=True):
        if not error <= MOST_ERROR * usual:  # a NaN is wrong, too
            return f"wrong numbers: the {name} is off by {error:.2g}, the own form's by {usual:.2g}"
    return ""
