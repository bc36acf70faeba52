"""The bytes that the devices of a mesh must send each other in one training step, by kind of collective.

all-to-all                   4 E b C D numbers for each layer and micro-batch: there and back, forward and backward;
                             b is the number of a device's sequences. 5 E b C D with remat, which sends the rows again.
                             With dispatch by blocks n b R in place of E b C. Each row has 4 bytes more for its gate, 4
                             for the gradient of the gate, and with blocks 4 for the number of its expert. With remat
                             the gate is sent again. The number is not, because routing decisions are kept. Nothing
                             without an expert axis.
all-gather                   each matrix that is cut over fsdp, once a step
all-reduce, reduce-scatter   each gradient in float32 once a step, however many micro-batches there are; and the
                             metrics. Of Adafactor also the means over an axis that is cut.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.config import RunConfig
from moe_jax.parallel.layout import Layout, leaf_name
from moe_jax.parallel.mesh import AXES

GATE_BYTES = EXPERT_BYTES = 4
"""Bytes of a row's gate, and of the number of its expert."""


def ideal_bytes(config: RunConfig, params: Mapping[Any, Any], layout: Layout, item_bytes: int) -> dict[str, int]:
    """Bytes on a device that one step must move, by kind of collective; reductions under the name "all-reduce".

    `params` are the parameters or their shapes. An activation takes `item_bytes` bytes.
    """
    model, train, mesh = config.model, config.train, layout.mesh
    found = {"all-to-all": 0, "all-gather": 0, "all-reduce": 0}
    if (devices := mesh.shape["expert"]) > 1:
        sequences = train.batch_size // layout.devices * train.grad_accum
        there = 2 if config.execution.remat else 1  # the backward pass then sends the rows again
        row = (there + 3) * model.width * item_bytes + (there + 1) * GATE_BYTES
        if model.routing.dispatch == "blocks":
            rows, row = devices * model.device_rows(devices), row + EXPERT_BYTES
        else:
            rows = model.experts * model.capacity
        found["all-to-all"] = model.layers * sequences * rows * row
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        cut, update = layout.params[name], layout.updates[name]
        local = p.size // math.prod(mesh.shape[a] for a in cut if a == "expert")
        if "fsdp" in cut:
            found["all-gather"] += local * p.dtype.itemsize
        if "fsdp" in update:
            found["all-reduce"] += 4 * local
            local //= mesh.shape["fsdp"]
            if train.optimizer == "adafactor":
                found["all-reduce"] += 4 * (local // p.shape[-1] + local // p.shape[-2])
        if any(mesh.shape[axis] > 1 and axis not in update for axis in AXES):
            found["all-reduce"] += 4 * local
    load = model.layers * model.experts if model.dense == "none" else 0
    found["all-reduce"] += 4 * (load + 4)
    return found
