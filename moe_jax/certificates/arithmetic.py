"""The arithmetic and the memory of the compiled programs, compared with their bounds.

The matrix products of the compiled program are compared with the bound of its dispatch: the slots of all experts for
`capacity`, the rows of the block plan for `blocks`. The bound is what the program must compute, so it may not have
fewer operations either: then products are missing, or `system.hlo` does not see them. The operations are also compared
with the all-experts form, where every expert computes every token. No array in a layer may be as large as the rows of
all tokens for all experts.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.certificates.certificate import Certificate
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.costs import bound_flops, count_parameters, layer_flops, multiplied_rows
from moe_jax.model.moe.functional import layer_shapes, with_gradients
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.reference import AllExpertsMoE
from moe_jax.system.hlo import Program, read_program
from moe_jax.training.programs import Programs

FORWARD_BOUND, GRADIENT_BOUND = 1.02, 1.03
"""Most operations of a compiled layer / its bound, without and with gradients. Some room is left for other products."""

_LAYER = ("router", "dispatch", "experts", "combine", "shared")
"""Named scopes of an MoE layer."""


def _layer_program(config: ModelConfig, batch: int, gradients: bool, moe: type[MoE] = MoE) -> Program:
    layer, params = layer_shapes(config, moe)
    x = jax.ShapeDtypeStruct((batch, config.seq_len, config.width), jnp.float32)

    def forward(params: dict, x: jax.Array) -> jax.Array:
        with jax.named_scope("ffn"):
            return layer(params, x)

    lowered = jax.jit(with_gradients(forward)).lower(params, x, x) if gradients else jax.jit(forward).lower(params, x)
    return read_program(lowered.compile().as_text())


def layer_arithmetic(config: ModelConfig) -> Iterator[Certificate]:
    """The compiled layer compared with its bound and with the all-experts form; and its largest arrays."""
    # The batch has more tokens than twice the width, so no weight gradient is as large as the rows that are looked for.
    batch = 2 * config.width // config.seq_len + 1
    bound, what_bounds = _bound(config, batch)
    for what, gradients, factor, limit in (
        ("forward", False, 1, FORWARD_BOUND),
        ("with gradients", True, 3, GRADIENT_BOUND),
    ):
        ours = _layer_program(config, batch, gradients)
        dense = _layer_program(config, batch, gradients, AllExpertsMoE)
        ratio = ours.flops / (factor * bound)
        yield Certificate(
            f"arithmetic: one layer, {what}",
            1 <= ratio <= limit,
            f"{ours.flops / 1e9:.3f} GFLOP, {ratio:.3f} x {what_bounds}; {_times(dense.flops, ours.flops)}",
            f"1 to {limit} x the bound",
        )
        rows = config.experts * batch * config.seq_len * max(config.width, config.expert_hidden)
        biggest, of_dense = ours.largest(1)[0], dense.largest(1)[0]
        yield Certificate(
            f"memory: one layer, {what}",
            biggest.elements < rows <= of_dense.elements,
            f"largest array {list(biggest.shape)}; with all experts {list(of_dense.shape)}",
            f"size < E x B x T x max(D, F) = {rows:,} <= size with all experts",
        )


def _bound(config: ModelConfig, batch: int) -> tuple[int, str]:
    """Most forward operations of a layer, and the name of this bound: the block plan for `blocks`, else all slots."""
    if config.routing.dispatch != "blocks":
        return bound_flops(config, batch), "the capacity bound"
    rows = multiplied_rows(config, batch) / (batch * config.seq_len * config.routing.top_k)
    return layer_flops(config, batch), f"the block plan ({rows:.2f} rows for each pair)"


def step_arithmetic(config: RunConfig, batch_size: int) -> Iterator[Certificate]:
    """The matrix products of the compiled training step, compared with the bound of its expert layers, and with the
    operations that attention, layers and head need at least."""
    model, tokens = config.model, batch_size * config.model.seq_len
    ours = read_program(Programs.of(config).compiled_step(batch_size).as_text())
    dense = read_program(Programs.of(config, moe=AllExpertsMoE).compiled_step(batch_size).as_text())
    bound, what_bounds = _bound(model, batch_size)
    experts = ours.flops_of(*_LAYER)
    recomputed = 4 / 3 if config.execution.remat else 1
    ratio = experts / (3 * model.layers * bound * recomputed)
    yield Certificate(
        "arithmetic: expert layers within the step",
        1 <= ratio <= GRADIENT_BOUND,
        f"{experts / 1e9:.2f} GFLOP, {ratio:.3f} x {what_bounds}; {_times(dense.flops_of(*_LAYER), experts)}",
        f"1 to {GRADIENT_BOUND} x the bound",
    )
    groups = count_parameters(model)
    head = groups["embedding, also the head" if model.tied_head else "head"].multiplied
    needed = {
        "attention": 6 * groups["attention"].multiplied * tokens,
        "ffn": 3 * model.layers * bound,
        "head": 6 * head * tokens,
    }
    parts = {part: ours.flops_of(part) for part in needed}
    rest = ours.flops - sum(parts.values())
    yield Certificate(
        "arithmetic: the whole step",
        ours.flops < dense.flops and all(parts[part] >= needed[part] for part in needed),
        ", ".join(f"{part} {flops / 1e9:.2f}" for part, flops in parts.items())
        + f", optimizer {rest / 1e9:.2f}, in all {ours.flops / 1e9:.2f} GFLOP; {_times(dense.flops, ours.flops)}",
        "fewer operations than the all-experts form; at least "
        + ", ".join(f"{part} {flops / 1e9:.2f}" for part, flops in needed.items()),
    )


def _times(dense: int, ours: int) -> str:
    """How many times as many operations the all-experts form has."""
    return f"all experts: {dense / ours:.2f} x as many" if ours else "no product was found in the program"
