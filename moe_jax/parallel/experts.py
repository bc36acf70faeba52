"""Expert parallelism: each device along the mesh axis `expert` holds E / n experts, and tokens travel to them.

Inside `shard_map`, a device routes its own sequences as one device would: a group is one sequence. One all-to-all
brings rows to the devices of their experts, and another one brings the results back (Lepikhin et al. 2020, "GShard",
section 3.2; `exchange.py`). The gradient is two more all-to-alls.

    by capacity   the rows are the slots of all E experts. Each of the four moves E * b * C * D numbers for each layer
                  and device, where b is the number of the device's sequences.
    by blocks     the rows are those of the n devices, n * b * R * D numbers (`expert_blocks.py`)

The gate of each row goes with it, and its gradient comes back: one number more for each row.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Float

from moe_jax.model.moe.dispatch import Blocks, Capacity, Dispatch, QueuedPairs
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing
from moe_jax.parallel.exchange import AXIS, exchange
from moe_jax.parallel.expert_blocks import DeviceQueues, ExchangedBlocks


@dataclass(frozen=True)
class Exchanged:
    """A dispatch by capacity whose experts lie on several devices."""

    local: Capacity

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        return self.local.apply(x, routing, partial(exchange, lambda rows, gate: experts(rows, gate=gate)))

    def trace(self, routing: Routing) -> QueuedPairs:
        return self.local.trace(routing)


class ExpertParallelMoE(MoE):
    """The MoE layer in training, inside `shard_map` over an axis `expert`. Its router knows all E experts, and its
    parameters `experts` are those of this device."""

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        dispatch = super().dispatch_for(mode, batch, tokens)
        if isinstance(dispatch, Capacity):
            return Exchanged(dispatch)
        if mode is not Mode.TRAIN or not isinstance(dispatch, Blocks):
            raise ValueError(f"{mode}: this layer is for training; other passes take those of `cut_model.py`")
        experts = self.router.shape[-1]
        return ExchangedBlocks(DeviceQueues.of(self.routing, tokens, experts, jax.lax.axis_size(AXIS)))
