"""Bringing tokens to experts and back.

A dispatch is an object with two methods. `apply` copies the tokens into rows, one for each (token, choice) pair, runs
the experts, and sums the results for each token. `trace` returns the place of each pair in its expert's queue.

    Capacity   every expert has C slots for each sequence; pairs beyond them are dropped. Training.
    Blocks     rows sorted by expert and cut into blocks of R rows, one expert a block; drops nothing. Dropless
               training, evaluation and prefill, at about the active arithmetic.
    PerToken   each pair is a group of its own and reads its expert's weights only; drops nothing. Decoding.

The first two have a method `plan`, which decides the row of each pair. They use two functions over rows `[G, B, R, D]`,
that is G groups of R rows for each sequence. `dispatch` copies tokens into rows, and `combine` sums rows back into
tokens. The batch stays an axis of its own, so a batch that is split over devices needs no communication here. Both
functions are linear maps, and each is the adjoint of the other. So their gradients are gathers too. There is no
scatter-add, hence the gradients have the same bits each time, and no array has the shape `[T, E, C]`.

Each row is multiplied with the gate of its pair (`row_gates`) before `combine`. In training the experts do this before
their last product (`Experts.__call__`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_jax.model.moe.experts import Experts, gated
from moe_jax.model.moe.router import DECISIONS, Routing, choice_counts, queue_positions


class Plan(NamedTuple):
    """The row of each pair, and the pair of each row. A sequence has T*K pairs in token-major order."""

    pair: Int[Array, "G B R"]
    """The pair t*K + k in each row; T*K where the row is empty."""
    row: Int[Array, "B T K"]
    """The row g*R + r of each pair; G*R where the pair was dropped."""
    keep: Bool[Array, "B T K"]
    """Whether the pair has a row."""


class QueuedPairs(NamedTuple):
    """The place of each pair in its expert's queue, for a trace."""

    position: Int[Array, "B T K"]
    """Place in the queue, from 0."""
    keep: Bool[Array, "B T K"]
    """Whether the pair was served."""


@runtime_checkable
class Dispatch(Protocol):
    """How the (token, choice) pairs of a batch reach their experts."""

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        """The gated sum of the chosen experts' outputs, and the share of each sequence's pairs that was dropped."""
        ...

    def trace(self, routing: Routing) -> QueuedPairs:
        """The place of each pair in its expert's queue, and whether the pair was served."""
        ...


# Capacity


@dataclass(frozen=True)
class Capacity:
    """Every expert has `slots` slots for each sequence, given out in token-major order. Later pairs are dropped."""

    slots: int
    """C, see `moe_jax.config.capacity`."""

    def plan(self, routing: Routing) -> Plan:
        """The kept pair at place p in the queue of expert e sits in row e*C + p."""
        position, keep = self.trace(routing)
        row = routing.expert_index * self.slots + position
        return row_plan(row, keep, routing.logits.shape[-1], self.slots)

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Callable[..., Array]
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        """See `Dispatch`. `experts` may be any function of rows [E, B*C, D] and their gates [E, B*C], such as one that
        sends them to other devices (`moe_jax.parallel.experts`)."""
        plan = self.plan(routing)
        with jax.named_scope("dispatch"):
            rows, gate = dispatch(x, plan), row_gates(routing.gate, plan)
        with jax.named_scope("experts"):
            groups, batch, slots, width = rows.shape
            flat = rows.reshape(groups, batch * slots, width)
            rows = experts(flat, gate=gate.reshape(groups, -1)).reshape(rows.shape)
        with jax.named_scope("combine"):
            return combine(rows, plan), drop_fraction(plan.keep)

    def trace(self, routing: Routing) -> QueuedPairs:
        position = queue_positions(routing.expert_index, routing.valid, routing.logits.shape[-1])
        return QueuedPairs(position, (position < self.slots) & routing.valid[..., None])


# Dropless


@dataclass(frozen=True)
class Blocks:
    """Every pair of the batch gets a row. Rows form blocks of `rows` rows, and each block belongs to one expert.

    The whole batch is treated as one sequence of N = B*T tokens. Block e, for e < E, is the first block of expert e.
    The further blocks follow, sorted by expert: an expert with n > 0 pairs has ceil(n / rows) - 1 further blocks. An
    expert has a further block only if its earlier blocks are full, so (pairs - 1) // rows further blocks always
    suffice. Unused blocks are empty and belong to the last expert.
    """

    rows: int
    """R, rows of a block."""
    in_place: bool = False
    """True: multiply with each expert's matrices in place, in a loop over the used blocks. This works only without a
    gradient, because the number of passes of the loop is not known when the program is compiled. False: all blocks are
    multiplied, used or not (`kernels/grouped_matmul.py`)."""

    def plan(self, routing: Routing) -> tuple[Plan, Int[Array, " further"], Int[Array, ""]]:
        """The plan over the whole batch as one sequence, the expert of each further block, and the number of used
        blocks, which come first."""
        top_k = routing.expert_index.shape[-1]
        return self.plan_queues(
            routing.expert_index.reshape(1, -1, top_k), routing.valid.reshape(1, -1), routing.logits.shape[-1]
        )

    def plan_queues(
        self, expert: Int[Array, "1 N K"], valid: Bool[Array, "1 N"], experts: int
    ) -> tuple[Plan, Int[Array, " further"], Int[Array, ""]]:
        """The same for N tokens, given the experts that they chose."""
        more = (expert.size - 1) // self.rows
        counts = choice_counts(expert, valid, experts).sum((0, 1))
        further = (-(-counts // self.rows) - 1).clip(0)
        ends = experts + jnp.cumsum(further)
        position = queue_positions(expert, valid, experts)
        nth, place = position // self.rows, position % self.rows
        block = jnp.where(nth == 0, expert, (ends - further)[expert] + nth - 1)
        further_expert = jnp.searchsorted(ends, experts + jnp.arange(more), side="right", method="compare_all")
        further_expert = checkpoint_name(further_expert.clip(0, experts - 1), DECISIONS)
        keep = jnp.broadcast_to(valid[..., None], block.shape)
        plan = row_plan(block * self.rows + place, keep, experts + more, self.rows)
        return plan, further_expert, ends[-1]

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        plan, further_expert, used = self.plan(routing)
        with jax.named_scope("dispatch"):
            rows = dispatch(x.reshape(1, -1, x.shape[-1]), plan)[:, 0]
            gate = row_gates(routing.gate.reshape(plan.row.shape), plan)[:, 0]
        with jax.named_scope("experts"):
            if self.in_place:
                rows = gated(experts.apply_blocks(rows, further_expert, used), gate)
            else:
                rows = experts(rows, further_expert, gate)
        with jax.named_scope("combine"):
            y = combine(rows[:, None], plan)
        # A pair is dropped only if its token is invalid.
        return y.reshape(x.shape), drop_fraction(plan.keep.reshape(len(x), -1))

    def trace(self, routing: Routing) -> QueuedPairs:
        return unlimited(routing)


@dataclass(frozen=True)
class PerToken:
    """One group of one row for each pair, so that only the weights of the chosen experts are read. For few tokens.

    The rows have the order of the pairs, so no plan is needed. The rows of a token are copies of it, and its output is
    the sum of its rows times their gates. An invalid token, whose gates are NaN, gets NaN.
    """

    skip: bool = False
    """Whether no expert is read for an invalid token. Looking for these takes longer than a small expert, so only a
    step of slots does it, some of which may have no token."""

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        pairs = routing.expert_index.shape
        with jax.named_scope("dispatch"):
            rows = jnp.broadcast_to(x[:, :, None], (*pairs, x.shape[-1])).reshape(-1, x.shape[-1])
        with jax.named_scope("experts"):
            wanted = jnp.broadcast_to(routing.valid[..., None], pairs).reshape(-1) if self.skip else None
            rows = experts.apply_per_token(rows, routing.expert_index.reshape(-1), wanted)
        with jax.named_scope("combine"):
            rows = gated(rows.reshape(*pairs, -1), routing.gate)
            y = functools.reduce(jnp.add, [rows[:, :, k] for k in range(pairs[-1])])  # in the order of k
        return y, drop_fraction(routing.valid)

    def trace(self, routing: Routing) -> QueuedPairs:
        return unlimited(routing)


def unlimited(routing: Routing) -> QueuedPairs:
    position = queue_positions(routing.expert_index, routing.valid, routing.logits.shape[-1])
    return QueuedPairs(position, jnp.broadcast_to(routing.valid[..., None], position.shape))


def drop_fraction(keep: Bool[Array, "B T *K"]) -> Float[Array, " B"]:
    """Share of each sequence's pairs that are not kept. Counted, so it is exactly 0 if none is dropped."""
    return (~keep).reshape(len(keep), -1).mean(1, dtype=jnp.float32)


# The two functions `dispatch` and `combine`


def row_plan(row: Array, keep: Array, groups: int, rows: int) -> Plan:
    """The plan, given the row of each kept pair. The pair of each row is computed by one scatter of integers, whose
    targets are distinct."""
    row = jnp.where(keep, row, groups * rows).astype(jnp.int32)
    batch, pairs = len(row), row[0].size

    def invert(row: Array) -> Array:
        empty = jnp.full(groups * rows, pairs, jnp.int32)
        return empty.at[row].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop", unique_indices=True)

    pair = jax.vmap(invert)(row.reshape(batch, -1))
    return checkpoint_name(Plan(pair.reshape(batch, groups, rows).swapaxes(0, 1), row, keep), DECISIONS)


_TOKENS = jax.lax.GatherDimensionNumbers(
    offset_dims=(3,),
    collapsed_slice_dims=(1,),
    start_index_map=(1,),
    operand_batching_dims=(0,),
    start_indices_batching_dims=(1,),
)
"""Gather from x [B, T, D] at indices [G, B, R, 1]. The batch is an axis of both."""
_ROWS = jax.lax.GatherDimensionNumbers(
    offset_dims=(2,),
    collapsed_slice_dims=(0, 2),
    start_index_map=(0, 2),
    operand_batching_dims=(1,),
    start_indices_batching_dims=(0,),
)
"""Gather from rows [G, B, R, D] at indices [B, T, 2]. The batch is an axis of both."""


def _gather(x: Array, index: Array, axes: jax.lax.GatherDimensionNumbers) -> Array:
    """Vectors along the last axis of x. Zeros if the index is out of range."""
    sizes = (1,) * (x.ndim - 1) + x.shape[-1:]
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.gather(x, index, axes, sizes, mode=mode, fill_value=0)


def _tokens_at(x: Float[Array, "B T D"], token: Int[Array, "G B R"]) -> Float[Array, "G B R D"]:
    """x[b, token[g, b, r]]. An empty row has the index T and gets zeros."""
    return _gather(x, token[..., None], _TOKENS)


def _rows_at(rows: Float[Array, "G B R D"], row: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """rows[g, b, r] for the row g*R + r of each token. A dropped pair has the index G*R and gets zeros."""
    return _gather(rows, jnp.stack([row // rows.shape[2], row % rows.shape[2]], axis=-1), _ROWS)


def _sum_of_choices(rows: Float[Array, "G B R D"], plan: Plan) -> Float[Array, "B T D"]:
    """sum_k (the row of pair b, t, k), in the order of k."""
    total = _rows_at(rows, plan.row[..., 0])
    for k in range(1, plan.row.shape[-1]):
        total = total + _rows_at(rows, plan.row[..., k])
    return total


@jax.custom_vjp
def dispatch(x: Float[Array, "B T D"], plan: Plan) -> Float[Array, "G B R D"]:
    """Copy each token into the rows of its kept choices. Empty rows are zero."""
    return _tokens_at(x, plan.pair // plan.row.shape[-1])


def _dispatch_forward(x: Array, plan: Plan) -> tuple[Array, Plan]:
    return dispatch(x, plan), plan


def _dispatch_backward(plan: Plan, d_rows: Array) -> tuple[Array, None]:
    # The adjoint of copying: the gradient of a token is the sum of the gradients of its kept rows.
    return _sum_of_choices(d_rows, plan), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def row_gates(gate: Float[Array, "B T K"], plan: Plan) -> Float[Array, "G B R"]:
    """The gate of the pair in each row, 0 for an empty row. The gate of a dropped pair, which may be NaN
    (`router.route`), is in no row."""
    batch, tokens, top_k = gate.shape
    one_choice = (batch, tokens * top_k, 1)  # each pair is copied as a token with a single choice
    pairs = Plan(plan.pair, plan.row.reshape(one_choice), plan.keep.reshape(one_choice))
    return dispatch(gate.reshape(one_choice), pairs)[..., 0]


@jax.custom_vjp
def combine(rows: Float[Array, "G B R D"], plan: Plan) -> Float[Array, "B T D"]:
    """y[b, t] = sum_k (the row of pair b, t, k), in the order of k. A dropped pair contributes 0."""
    return _sum_of_choices(rows, plan)


def _combine_forward(rows: Array, plan: Plan) -> tuple[Array, Plan]:
    return combine(rows, plan), plan


def _combine_backward(plan: Plan, d_y: Array) -> tuple[Array, None]:
    return dispatch(d_y, plan), None


combine.defvjp(_combine_forward, _combine_backward)
