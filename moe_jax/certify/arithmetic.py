"""The arithmetic of the compiled programs, compared with its bounds.

The matrix products of a compiled layer are compared with the bound of its dispatch: the slots of all experts for
`capacity`, the rows of the block plan for `blocks`. The bound is what the program must compute, so it may not have
fewer operations either: then products are missing, or `system.hlo` does not see them. The operations are also compared
with the all-experts form, where every expert computes every token.

The products of a compiled step are divided by their named scopes: attention, expert layers, head, and the rest. Each
part is compared with its formula (`costs.step_products`), from below and from above.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.certify import Certificate
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.costs import layer_flops, multiplied_rows, step_products
from moe_jax.model.kernels import cross_entropy
from moe_jax.model.moe.layer import AllExpertsMoE, MoE, layer_shapes, with_gradients
from moe_jax.system.hlo import Program, read_program
from moe_jax.training.programs import Programs

FORWARD_BOUND, GRADIENT_BOUND = 1.02, 1.03
"""Most operations of a compiled layer / its bound, without and with gradients. Some room is left for other products."""

PARTS = {"attention": "attention", "ffn": "the expert layers", "head": "the head"}
"""Named scopes of a training step whose products are counted, and what people call them."""


def _layer_program(config: ModelConfig, gradients: bool, moe: type[MoE] = MoE) -> Program:
    layer, params = layer_shapes(config, moe)
    x = jax.ShapeDtypeStruct((1, config.seq_len, config.width), jnp.float32)

    def forward(params: dict, x: jax.Array) -> jax.Array:
        with jax.named_scope("ffn"):
            return layer(params, x)

    lowered = jax.jit(with_gradients(forward)).lower(params, x, x) if gradients else jax.jit(forward).lower(params, x)
    return read_program(lowered.compile().as_text())


def layer_arithmetic(config: ModelConfig) -> Iterator[Certificate]:
    """The compiled layer compared with its bound and with the all-experts form, on one sequence."""
    bound = layer_flops(config, 1)
    for what, gradients, factor, limit in (
        ("forward", False, 1, FORWARD_BOUND),
        ("with gradients", True, 3, GRADIENT_BOUND),
    ):
        ours = _layer_program(config, gradients)
        dense = _layer_program(config, gradients, AllExpertsMoE)
        ratio = ours.flops / (factor * bound)
        yield Certificate(
            f"arithmetic: one layer, {what}",
            1 <= ratio <= limit,
            f"{ours.flops / 1e9:.3f} GFLOP, {ratio:.3f} x {_what_bounds(config)}; {_times(dense.flops, ours.flops)}",
            f"1 to {limit} x as many",
            title=f"operations of one layer, {what}",
        )


def _what_bounds(config: ModelConfig) -> str:
    if config.routing.dispatch != "blocks":
        return "what all slots need"
    rows = multiplied_rows(config, 1) / (config.seq_len * config.routing.top_k)
    return f"what all rows of the blocks need ({rows:.2f} rows for each choice)"


def step_arithmetic(config: RunConfig, batch_size: int) -> Iterator[Certificate]:
    """The matrix products of the compiled training step, part by part, compared with their formulas.

    A run with adapters (`train.lora_rank`) is tested by the step that trains all weights.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, lora_rank=0, train_router=False))
    programs = Programs.of(config)
    ours = read_program(programs.compiled_step(batch_size).as_text())
    dense = read_program(Programs.of(config, moe=AllExpertsMoE).compiled_step(batch_size).as_text())
    cudnn = programs.attention.implementation == "cudnn"
    needed = step_products(config, batch_size, cudnn=cudnn)
    parts = {part: ours.flops_of(part) for part in PARTS}
    # The compiler rewrites some products and drops their names, such as those with a single head of keys. They may
    # belong to any part.
    unnamed = sum(dot.total for dot in ours.dots if not dot.op_name)
    missing = {part: max(0, needed[part] - flops) for part, flops in parts.items()}
    for part, what in PARTS.items():
        most = GRADIENT_BOUND * needed[part] * (_head_padding(config.model) if part == "head" else 1)
        found = f"{parts[part] / 1e9:.3f} GFLOP, {parts[part] / needed[part]:.3f} x the formula"
        if missing[part] and unnamed:
            found += f"; {unnamed / 1e9:.3f} GFLOP of the step have no name"
        if part == "ffn":
            found += f"; {_times(dense.flops_of(part), parts[part])}"
        yield Certificate(
            f"arithmetic: {'expert layers' if part == 'ffn' else part} within the step",
            needed[part] - unnamed <= parts[part] <= most,
            found,
            f"1 to {most / needed[part]:.3g} x {needed[part] / 1e9:.3f} GFLOP",
            title=f"operations of {what} in a training step",
        )
    rest = ours.flops - sum(parts.values())
    own = rest - sum(missing.values())
    yield Certificate(
        "arithmetic: the whole step",
        ours.flops < dense.flops and needed["rest"] <= own <= GRADIENT_BOUND * needed["rest"],
        f"{ours.flops / 1e9:.3f} GFLOP, {rest / 1e9:.3f} of them outside of attention, expert layers and head; "
        + _times(dense.flops, ours.flops),
        f"fewer than the all-experts form; outside of these parts {(rest - own + needed['rest']) / 1e9:.3f} GFLOP, for "
        + f"the optimizer ({config.train.optimizer}), or up to {GRADIENT_BOUND} x as many",
        title="operations of the whole training step",
    )


def _head_padding(model: ModelConfig) -> float:
    """Columns of the head that are multiplied, divided by the vocabulary, on the devices that pad it."""
    form = cross_entropy.cpu_form() if jax.default_backend() == "cpu" else cross_entropy.gpu_form()
    return -(-model.vocab_size // form.columns) * form.columns / model.vocab_size


def _times(dense: int, ours: int) -> str:
    """How many times as many operations the all-experts form has."""
    if not ours:
        return "no product was found in the program"
    return f"with every expert on every token {dense / ours:.2f} x as many"
