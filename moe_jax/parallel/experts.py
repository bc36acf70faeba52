"""Expert parallelism: each device along the mesh axis `expert` holds E / n experts, and tokens travel to them.

Inside `shard_map`, a device routes its own sequences as one device would: a group is one sequence. It fills the slots
of all E experts. One all-to-all brings the slots to the devices of their experts, and another one brings the results
back (Lepikhin et al. 2020, "GShard", section 3.2). The gradient is two more all-to-alls. Each of the four moves
E * b * C * D numbers for each layer and device, where b is the number of the device's sequences. Chapter 19 of
`foundation` derives the way back.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Float

from moe_jax.model.moe.dispatch import Capacity, Dispatch, QueuedPairs
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing

AXIS = "expert"


def exchange(experts: Experts, rows: Float[Array, "E R D"]) -> Float[Array, "E R D"]:
    """The experts' outputs for the rows of this device, in the order of the rows. `experts` are those of this device.

    Device j holds the experts j*E/n to (j+1)*E/n - 1, with the rows of all n devices side by side.
    """
    there = jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)
    return jax.lax.all_to_all(experts(there), AXIS, split_axis=1, concat_axis=0, tiled=True)


@dataclass(frozen=True)
class Exchanged:
    """A dispatch by capacity whose experts lie on several devices."""

    local: Capacity

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        return self.local.apply(x, routing, partial(exchange, experts))

    def trace(self, routing: Routing) -> QueuedPairs:
        return self.local.trace(routing)


class ExpertParallelMoE(MoE):
    """The MoE layer in training, inside `shard_map` over an axis `expert`. Its router knows all E experts, and its
    parameters `experts` are those of this device."""

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        dispatch = super().dispatch_for(mode, batch, tokens)
        if not isinstance(dispatch, Capacity):
            raise ValueError(f"{type(dispatch).__name__}: only dispatch by capacity can send tokens to other devices")
        return Exchanged(dispatch)
