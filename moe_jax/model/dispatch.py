"""Bringing tokens to experts and back: two verbs, `dispatch` and `combine`, over a plan.

Experts work on *groups of rows* `[G, R, D]`: each group is multiplied with the weights of one expert. A `Plan`
says which token fills each row and in which row each (token, choice) pair sits. Three plans share the two verbs:

    plan_capacity    G = E, R = B*C: every expert has C slots a sequence; pairs beyond them are dropped. Training.
    plan_blocks      G = E + (pairs-1) // R blocks of R rows, one for each expert and more for those that need
                     more: drops nothing, at about the active arithmetic. Evaluation, generation.
    plan_per_token   G = pairs, R = 1: reads the weights of the chosen experts only. Few tokens.

Both verbs are linear maps, and each is the other's adjoint up to the gate. So their gradients are written as
gathers too: no scatter-add, hence the same bits each time on every device, and no `[T, E, C]` array anywhere.

`einsum_masks` and `dense_combine` are the slow references: GShard's one-hot form, and all experts on all tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import Priority
from moe_jax.model.routing import Routing, choice_counts, places, positions_in_expert


class Plan(NamedTuple):
    """Where each pair sits. N = B*T tokens in order, N*K pairs in token-major order."""

    pair: Int[Array, "G R"]
    """The pair n*K + k in each row; N*K where the row is empty."""
    row: Int[Array, "N K"]
    """The row g*R + r of each pair; G*R where it was dropped."""
    keep: Bool[Array, "N K"]
    """Whether the pair has a row."""
    group_expert: Int[Array, " G"] | None
    """The expert of each group; None where group g is expert g."""
    used: Int[Array, ""] | None = None
    """How many groups, from the first, may hold pairs; None where all may."""


def _plan(row: Array, keep: Array, groups: int, rows: int, group_expert: Array | None) -> Plan:
    """A plan from the row of each kept pair: the inverse map by one scatter of integers, whose targets are distinct."""
    pairs = row.size
    row = jnp.where(keep, row, groups * rows).astype(jnp.int32)
    pair = jnp.full(groups * rows, pairs, jnp.int32)
    pair = pair.at[row.reshape(-1)].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop", unique_indices=True)
    return Plan(pair.reshape(groups, rows), row, keep, group_expert)


def plan_capacity(routing: Routing, capacity: int, priority: Priority = "token") -> Plan:
    """Slots of a sequence are given to its pairs by `priority` until an expert's `capacity` is used up."""
    batch, tokens, top_k = routing.expert.shape
    experts = routing.logits.shape[-1]
    position = places(routing, priority)
    keep = (position < capacity) & routing.valid[..., None]
    sequence = jnp.arange(batch)[:, None, None]
    row = (routing.expert * batch + sequence) * capacity + position
    shape = (batch * tokens, top_k)
    return _plan(row.reshape(shape), keep.reshape(shape), experts, batch * capacity, None)


def plan_blocks(routing: Routing, block: int) -> Plan:
    """Every pair of the batch gets a row, in blocks of `block` rows that belong to one expert each.

    Block e is expert e's first. The others follow, expert by expert: an expert with n pairs has ceil(n / block) - 1 of
    them. Each comes after a full one and holds a pair of its own, so (pairs - 1) // block always suffice. Blocks beyond
    those in use are empty and belong to the last expert.
    """
    batch, tokens, top_k = routing.expert.shape
    experts = routing.logits.shape[-1]
    more = (batch * tokens * top_k - 1) // block
    expert = routing.expert.reshape(1, -1, top_k)
    valid = routing.valid.reshape(1, -1)
    counts = choice_counts(expert, valid, experts).sum((0, 1))
    blocks = (-(-counts // block) - 1).clip(0)
    ends = experts + jnp.cumsum(blocks)
    position = positions_in_expert(expert, valid, experts)[0]
    nth, place = position // block, position % block
    row = jnp.where(nth == 0, expert[0], (ends - blocks)[expert[0]] + nth - 1) * block + place
    rest = jnp.searchsorted(ends, experts + jnp.arange(more), side="right").clip(0, experts - 1)
    keep = jnp.broadcast_to(valid[0][:, None], row.shape)
    plan = _plan(row, keep, experts + more, block, jnp.concatenate([jnp.arange(experts), rest]))
    return plan._replace(used=ends[-1])


def plan_per_token(routing: Routing) -> Plan:
    """One group of one row for each pair."""
    pairs = routing.expert.size
    row = jnp.arange(pairs).reshape(-1, routing.expert.shape[-1])
    keep = jnp.broadcast_to(routing.valid.reshape(-1, 1), row.shape)
    return _plan(row, keep, pairs, 1, routing.expert.reshape(-1))


def _take(rows: Float[Array, "M D"], index: Array) -> Array:
    """rows[index], and zeros where the index is M: an empty row, or a dropped pair."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _sum_of_choices(rows: Float[Array, "M D"], plan: Plan, gate: Array | None) -> Float[Array, "N D"]:
    """sum_k gate[n, k] * rows[row[n, k]], in the order of k; without gates, sum_k rows[row[n, k]]."""
    terms = [_take(rows, plan.row[:, k]) for k in range(plan.row.shape[1])]
    if gate is not None:
        # The gate of a dropped pair must not multiply, for it may be NaN: `_take` gave 0 there.
        gate = jnp.where(plan.keep, gate, 0).astype(rows.dtype)
        terms = [term * gate[:, k, None] for k, term in enumerate(terms)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@jax.custom_vjp
def dispatch(x: Float[Array, "N D"], plan: Plan) -> Float[Array, "G R D"]:
    """Copy each token into the rows of its kept choices; empty rows are zero."""
    return _take(x, plan.pair // plan.row.shape[1])


def _dispatch_forward(x: Array, plan: Plan) -> tuple[Array, Plan]:
    return dispatch(x, plan), plan


def _dispatch_backward(plan: Plan, d_rows: Array) -> tuple[Array, None]:
    # A token's gradient is the sum over its kept rows: the adjoint of copying.
    return _sum_of_choices(d_rows.reshape(-1, d_rows.shape[-1]), plan, None), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "G R D"], gate: Float[Array, "N K"], plan: Plan) -> Float[Array, "N D"]:
    """y[n] = sum_k gate[n, k] * (the row of pair n, k), summed in the order of k; a dropped pair contributes 0."""
    return _sum_of_choices(rows.reshape(-1, rows.shape[-1]), plan, gate)


def _combine_forward(rows: Array, gate: Array, plan: Plan) -> tuple[Array, tuple[Array, Array, Plan]]:
    return combine(rows, gate, plan), (rows, gate, plan)


def _combine_backward(residuals: tuple[Array, Array, Plan], d_y: Array) -> tuple[Array, Array, None]:
    rows, gate, plan = residuals
    top_k = plan.row.shape[1]
    gate_of_row = jnp.take(gate.reshape(-1), plan.pair, mode="fill", fill_value=0).astype(rows.dtype)
    d_rows = _take(d_y, plan.pair // top_k) * gate_of_row[..., None]
    flat = rows.reshape(-1, rows.shape[-1])
    wide = jnp.promote_types(gate.dtype, rows.dtype)
    d_gate = [jnp.sum(_take(flat, plan.row[:, k]) * d_y, axis=-1, dtype=wide).astype(gate.dtype) for k in range(top_k)]
    return d_rows, jnp.stack(d_gate, axis=-1), None


combine.defvjp(_combine_forward, _combine_backward)


def einsum_masks(
    routing: Routing, capacity: int, priority: Priority = "token"
) -> tuple[Float[Array, "B T E C"], Float[Array, "B T E C"]]:
    """GShard's one-hot dispatch and combine masks (Lepikhin et al. 2020, algorithm 1), with our priority.

    dispatch = einsum("btec,btd->ebcd"), combine = einsum("btec,ebcd->btd"). A reference: T x E x C numbers a
    sequence, and 2 x T x E x C x D operations each way.
    """
    experts = routing.logits.shape[-1]
    position = places(routing, priority)
    slots = jax.nn.one_hot(position, capacity, dtype=routing.probs.dtype)  # a position beyond C is all zeros
    choice = jax.nn.one_hot(routing.expert, experts, dtype=routing.probs.dtype) * routing.valid[..., None, None]
    gate = jnp.where(routing.valid[..., None], routing.gate, 0)
    return (
        jnp.einsum("btke,btkc->btec", choice, slots),
        jnp.einsum("btk,btke,btkc->btec", gate, choice, slots),
    )


def dense_combine(rows: Float[Array, "E N D"], routing: Routing) -> Float[Array, "N D"]:
    """Combine where every expert has seen every token: the oracle in jax, without capacity."""
    experts = routing.logits.shape[-1]
    gate = jnp.where(routing.valid[..., None], routing.gate, 0)
    weight = (jax.nn.one_hot(routing.expert, experts, dtype=gate.dtype) * gate[..., None]).sum(-2)
    return jnp.einsum("ne,end->nd", weight.reshape(-1, experts).astype(rows.dtype), rows)
