"""Expert parallelism: each device along the mesh axis `expert` holds E / n experts, and tokens travel to them.

Inside `shard_map`, a device routes its own sequences as one device would: a group is one sequence. One all-to-all
brings rows to the devices of their experts, and another one brings the results back (Lepikhin et al. 2020, "GShard",
section 3.2). The gradient is two more all-to-alls; chapter 19 of `foundation` derives it.

    by capacity   the rows are the slots of all E experts. Each of the four all-to-alls moves E * b * C * D numbers for
                  each layer and device, where b is the number of the device's sequences.
    by blocks     the rows are those of the n devices, n * b * R * D numbers

The gate of each row goes with it, and its gradient comes back: one number more for each row.

By blocks nothing is dropped on one device. Here the size of an array cannot depend on the router. So a sequence may
send at most R rows to one device: its fair share T * K / n of the (token, choice) pairs times a factor
(`device_rows`). A pair that finds no row is dropped and counted. An expert has no bound of its own: the experts
of a device share its R rows. The rows are given out in token-major order, for each sequence on its own. So no token
takes a row from an earlier one, and no sequence from another one: what holds for dispatch by capacity holds here.

`jax.lax.ragged_all_to_all` would send only the rows that are filled. XLA does not have it for CPUs (jax 0.12).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe_jax.model.moe.dispatch import (
    Blocks,
    Capacity,
    Dispatch,
    Plan,
    QueuedPairs,
    combine,
    dispatch,
    drop_fraction,
    row_gates,
    row_plan,
)
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import Mode, MoE, block_rows
from moe_jax.model.moe.router import Routing, queue_positions

AXIS = "expert"


def sent(rows: Shaped[Array, "E R *D"]) -> Shaped[Array, "G S *D"]:
    """The rows of all n devices for the groups of this device, with the rows of the devices side by side: G = E / n
    groups of S = n * R rows. Device j has the groups j*E/n to (j+1)*E/n - 1."""
    return jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)


def exchange(
    experts: Callable[[Array, Array], Array], rows: Float[Array, "E R D"], gate: Float[Array, "E R"]
) -> Float[Array, "E R D"]:
    """The experts' outputs for the rows of this device, times their gates, in the order of the rows. `experts` are
    those of this device, a function of the rows and gates that arrive.

    The gates travel with the rows, because they enter before the last product (`Experts.__call__`). Multiplying the
    results here would round them in another way than one device does.
    """
    return jax.lax.all_to_all(experts(sent(rows), sent(gate)), AXIS, split_axis=1, concat_axis=0, tiled=True)


class Exchanged(Capacity):
    """A dispatch by capacity whose experts lie on several devices."""

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Callable[..., Array]
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        return super().apply(x, routing, partial(exchange, lambda rows, gate: experts(rows, gate=gate)))


@dataclass(frozen=True)
class ExchangedBlocks:
    """Dispatch by blocks whose experts lie on several devices. For use inside `shard_map` over an axis `expert`.

    Each of `devices` devices has `rows` rows for each sequence, given out in token-major order.
    """

    devices: int
    """n, which divides E. Device j holds the experts j*E/n to (j+1)*E/n - 1."""
    rows: int
    """R, see `device_rows`."""

    def trace(self, routing: Routing) -> QueuedPairs:
        """The place of each pair in the queue of its expert's device. Two choices of a token may be in one queue, so
        pairs are counted, and not tokens."""
        device = self._device(routing)
        pairs = device.reshape(len(device), -1, 1)
        valid = jnp.repeat(routing.valid, device.shape[-1], axis=1)
        position = queue_positions(pairs, valid, self.devices).reshape(device.shape)
        return QueuedPairs(position, (position < self.rows) & routing.valid[..., None])

    def plan(self, routing: Routing) -> Plan:
        """The kept pair at place p in the queue of device j sits in row j*R + p."""
        position, keep = self.trace(routing)
        return row_plan(self._device(routing) * self.rows + position, keep, self.devices, self.rows)

    def _device(self, routing: Routing) -> Int[Array, "B T K"]:
        return routing.expert_index // (routing.logits.shape[-1] // self.devices)

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        """See `Dispatch`. `experts` are those of this device."""
        plan = self.plan(routing)
        with jax.named_scope("dispatch"):
            rows, gate = dispatch(x, plan), row_gates(routing.gate, plan)
            devices, batch, count, width = rows.shape
            own = routing.logits.shape[-1] // devices
            expert = sent(_expert_of_rows(routing.expert_index % own, plan, own))
            blocks = Blocks(block_rows(routing.expert_index.size, own))
        with jax.named_scope("experts"):
            rows = rows.reshape(devices, batch * count, width)
            rows = exchange(
                partial(_apply_sorted, blocks, experts, expert, own), rows, gate.reshape(devices, batch * count)
            )
        with jax.named_scope("combine"):
            y = combine(rows.reshape(devices, batch, count, width), plan)
        return y, drop_fraction(plan.keep)


class ExpertParallelMoE(MoE):
    """The MoE layer in training, inside `shard_map` over an axis `expert`. Its router knows all E experts, and its
    parameters `experts` are those of this device."""

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        dispatch = super().dispatch_for(mode, batch, tokens)
        if isinstance(dispatch, Capacity):
            return Exchanged(dispatch.slots)
        if mode is not Mode.TRAIN or not isinstance(dispatch, Blocks):
            raise ValueError(f"{mode}: this layer is for training; other passes use the plain one")
        policy, devices = self.routing, jax.lax.axis_size(AXIS)
        rows = device_rows(tokens, self.router.shape[-1], policy.top_k, devices, policy.device_capacity_factor)
        return ExchangedBlocks(devices, rows)


def device_rows(tokens: int, experts: int, top_k: int, devices: int, factor: float) -> int:
    """Rows of one of n devices, with E / n experts each, for a group of `tokens`: min(T * min(K, E / n), max(1,
    ceil(factor * T * K / n))).

    The arithmetic is exact, as that of `capacity`. A token's choices are distinct, so at most E / n of them are experts
    of one device.
    """
    exact = Fraction(str(factor)) * tokens * top_k / devices
    return min(tokens * min(top_k, experts // devices), max(1, math.ceil(exact)))


def _expert_of_rows(expert: Int[Array, "B T K"], plan: Plan, empty: int) -> Int[Array, "n S"]:
    """The number of each row's expert among those of its device, for S = B * R rows of each device. An empty row gets
    `empty`."""
    devices, batch, _ = plan.pair.shape
    pair = plan.pair.swapaxes(0, 1).reshape(batch, -1)  # T*K where the row is empty
    expert_of_row = jnp.take_along_axis(expert.reshape(batch, -1), pair, axis=1, mode="fill", fill_value=empty)
    return expert_of_row.reshape(batch, devices, -1).swapaxes(0, 1).reshape(devices, -1)


def _apply_sorted(
    blocks: Blocks,
    experts: Experts,
    expert: Int[Array, "1 N"],
    own: int,
    rows: Float[Array, "1 N D"],
    gate: Float[Array, "1 N"],
) -> Float[Array, "1 N D"]:
    """The networks of this device's `own` experts on the rows that have arrived, times their gates. Empty rows give
    zeros."""
    valid = expert < own
    plan, further_expert, _ = blocks.plan_queues(jnp.where(valid, expert, 0)[..., None], valid, own)
    sorted_rows, sorted_gate = dispatch(rows, plan)[:, 0], row_gates(gate[..., None], plan)[:, 0]
    return combine(experts(sorted_rows, further_expert, sorted_gate)[:, None], plan)
