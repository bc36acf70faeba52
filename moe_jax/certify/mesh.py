"""Certificates of a training step on a mesh: causality, the arithmetic of a device, and what devices send each other.

The bytes of each kind of collective are compared with what the algorithm must move (`ideal_bytes`):

all-to-all                   4 E b C D numbers for each layer and micro-batch: there and back, forward and backward;
                             b is the number of a device's sequences. 5 E b C D with remat, which sends the rows again.
                             With dispatch by blocks n b R in place of E b C. Each row has 4 bytes more for its gate, 4
                             for the gradient of the gate, and with blocks 4 for the number of its expert. With remat
                             the gate is sent again. The number is not, because routing decisions are kept. Nothing
                             without an expert axis.
all-gather                   each matrix that is sharded over fsdp, once a step
all-reduce, reduce-scatter   each gradient in float32 once a step, however many micro-batches there are; and the
                             metrics. Of Adafactor also the means over an axis that is sharded.

So a program that sends tokens in another way, or gradients more often, fails. The plain step that GSPMD divides by
itself fails every one of these claims (`tests/parallel/test_certificates.py`).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.certify import Certificate
from moe_jax.certify.arithmetic import PARTS, part_products
from moe_jax.certify.causality import tight, tokens_causality
from moe_jax.certify.collectives import Collective, bytes_by_kind, read_collectives
from moe_jax.config import RunConfig
from moe_jax.model.transformer import Params
from moe_jax.parallel.layout import AXES, Layout, leaf_name
from moe_jax.system.hlo import Program, read_program
from moe_jax.training.on_mesh import make_mesh_forward
from moe_jax.training.programs import Programs

SLACK = 1.02
"""Most bytes of reductions / the ideal."""
SCALARS = 256
"""Bytes for sums of single numbers, such as the global norm of the gradient."""
REDUCTIONS = ("all-reduce", "reduce-scatter")
GATE_BYTES = EXPERT_BYTES = 4
"""Bytes of a row's gate, and of the number of its expert."""


def certify_mesh(config: RunConfig, params: Params, mesh: Mesh) -> Iterator[Certificate]:
    """Yield the certificates of the training step of `config` on a mesh. `config.train.batch_size` sequences are one
    micro-batch. `config.model.vocab_size` must not be 0. Adapters are merged into `params`, so the step is that of the
    plain model."""
    plain = dataclasses.replace(config.train, lora_rank=0, lora_alpha=0.0, train_router=False)
    config = dataclasses.replace(config, train=plain)
    if config.model.dense == "none":
        yield mesh_causality(config, params, mesh)
    programs = Programs.of(config, mesh=mesh)
    assert programs.layout is not None
    train = config.train
    text = programs.compiled_step(train.batch_size, train.grad_accum).as_text()
    needed = part_products(programs, train.batch_size // mesh.size, mesh.shape["expert"])
    yield divided_arithmetic(read_program(text), {part: train.grad_accum * needed[part] for part in PARTS}, mesh.size)
    item = jnp.dtype(programs.policy.compute).itemsize
    if mesh.devices.flat[0].platform == "cpu":
        item = max(item, 4)  # XLA widens bfloat16 in the collectives of CPUs
    ideal = ideal_bytes(config, programs.param_shapes, programs.layout, item)
    yield from certify_collectives(read_collectives(text), ideal)


def mesh_causality(config: RunConfig, params: Params, mesh: Mesh) -> Certificate:
    """The causality of the whole model in training mode on the mesh. Each device has two sequences or more, so that a
    sequence that is left alone has a neighbour that changes."""
    model = tight(config.model)
    programs = Programs.of(dataclasses.replace(config, model=model), mesh=mesh)
    layout = programs.layout
    assert layout is not None
    placed = jax.device_put(params, layout.shardings(params, layout.params))
    forward = [make_mesh_forward(layout, programs.training_graphdef, programs.param_shapes, t) for t in (False, True)]
    devices = mesh.shape["expert"]
    slots = None if model.dropless else model.capacity
    if model.dropless and devices > 1:
        slots = model.device_rows(devices)

    def run(tokens: Any, trace: bool = False) -> tuple[Any, Any]:
        return forward[trace](placed, tokens)[:2]

    return tokens_causality("mesh: causality of the whole model", model, run, slots, 2 * mesh.size)


def divided_arithmetic(program: Program, needed: dict[str, int], devices: int) -> Certificate:
    """Each of the devices computes exactly the products that its share of the sequences needs, in every part."""
    computed = {part: program.flops_of(part) for part in PARTS}
    return Certificate(
        "mesh: products of a device",
        all(computed[part] > 0 and 0 <= needed[part] - computed[part] <= program.unnamed for part in PARTS),
        ", ".join(f"{part} {flops:,}" for part, flops in computed.items()),
        f"exactly those of 1/{devices} of the sequences: " + ", ".join(f"{part} {needed[part]:,}" for part in PARTS),
    )


def certify_collectives(collectives: list[Collective], ideal: dict[str, int]) -> Iterator[Certificate]:
    """The collectives of a step, compared with `ideal_bytes`."""
    moved = bytes_by_kind(collectives)
    sent, needed = moved.get("all-to-all", 0), ideal["all-to-all"]
    yield Certificate(
        "mesh: tokens travel to their experts",
        sent == needed,
        f"{sent:,} bytes of all-to-all a step and device",
        f"exactly {needed:,}: each row to its expert's device and back, twice; or none without an expert axis",
    )
    gathered, needed = moved.get("all-gather", 0), ideal["all-gather"]
    permuted = moved.get("collective-permute", 0)
    yield Certificate(
        "mesh: only parameters are gathered",
        gathered == needed and permuted == 0,
        f"{gathered:,} bytes of all-gather, {permuted:,} of collective-permute",
        f"exactly {needed:,}, each matrix that is sharded over fsdp once; no collective-permute",
    )
    reductions = [c for c in collectives if c.kind in REDUCTIONS]
    reduced, needed = sum(c.total for c in reductions), ideal["all-reduce"]
    narrow = [c for c in reductions if any(dtype != "f32" and dtype != "f64" for dtype, _ in c.operands)]
    looped = [c for c in reductions if c.loops]
    yield Certificate(
        "mesh: gradients are summed once a step",
        needed <= reduced <= SLACK * needed + SCALARS and not narrow and not looped,
        f"{reduced:,} bytes in {len(reductions)} reductions, {len(looped)} in a loop, {len(narrow)} below float32",
        f"{needed:,} to {SLACK} x as many, all in float32 and outside of loops",
    )


def ideal_bytes(config: RunConfig, params: Mapping[Any, Any], layout: Layout, item_bytes: int) -> dict[str, int]:
    """Bytes on a device that one step must move, by kind of collective; reductions under the name "all-reduce".

    `params` are the parameters or their shapes. An activation takes `item_bytes` bytes.
    """
    model, train, mesh = config.model, config.train, layout.mesh
    total = {"all-to-all": 0, "all-gather": 0, "all-reduce": 0}
    if (devices := mesh.shape["expert"]) > 1:
        sequences = train.batch_size // layout.devices * train.grad_accum
        there = 2 if config.execution.remat else 1  # the backward pass then sends the rows again
        row = (there + 3) * model.width * item_bytes + (there + 1) * GATE_BYTES
        if model.routing.dispatch == "blocks":
            rows, row = devices * model.device_rows(devices), row + EXPERT_BYTES
        else:
            rows = model.experts * model.capacity
        total["all-to-all"] = model.layers * sequences * rows * row
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        axes, update = layout.params[name], layout.updates[name]
        local = p.size // math.prod(mesh.shape[a] for a in axes if a == "expert")
        if "fsdp" in axes:
            total["all-gather"] += local * p.dtype.itemsize
        if "fsdp" in update:
            total["all-reduce"] += 4 * local
            local //= mesh.shape["fsdp"]
            if train.optimizer == "adafactor":
                total["all-reduce"] += 4 * (local // p.shape[-1] + local // p.shape[-2])
        if any(mesh.shape[axis] > 1 and axis not in update for axis in AXES):
            total["all-reduce"] += 4 * local
    load = model.layers * model.experts if model.dense == "none" else 0
    total["all-reduce"] += 4 * (load + 4)
    return total
