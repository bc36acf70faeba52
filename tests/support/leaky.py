"""Priorities that leak the future: a later token can take a slot from an earlier one. No run can choose them.

The causality test must find each of them. Chapter 12 of `foundation` derives why they leak.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.model.moe.dispatch import Capacity, Dispatch, Plan, QueuedPairs
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing, queue_positions

Priority = Literal["leaky-choice-major", "leaky-batch-priority", "leaky-expert-choice"]


@dataclass(frozen=True)
class LeakyCapacity(Capacity):
    """Every expert has `slots` slots. Under these rules a later token can take a slot from an earlier token.

    leaky-choice-major      all first choices, then all second choices (Lepikhin et al. 2020, algorithm 1)
    leaky-batch-priority    as leaky-choice-major, but tokens by their largest probability, not by position (Riquelme et
                            al. 2021, section 4)
    leaky-expert-choice     each expert takes the C tokens that like it most (Zhou et al. 2022, section 3.2)
    """

    priority: Priority = "leaky-choice-major"

    def plan(self, routing: Routing) -> Plan:
        return super().plan(requested_pairs(self, routing))

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Callable[..., Array]
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        return super().apply(x, requested_pairs(self, routing), experts)

    def trace(self, routing: Routing) -> QueuedPairs:
        requests = requested_pairs(self, routing)
        position = leaky_queue_positions(requests, self.priority)
        return QueuedPairs(position, (position < self.slots) & requests.valid[..., None])

    def drop_fraction(self, keep: Bool[Array, "B T K"]) -> Float[Array, " B"]:
        """Under expert choice, the share of tokens that no expert took. Otherwise the share of dropped pairs."""
        if self.priority == "leaky-expert-choice":
            keep = keep.any(-1)
        return super().drop_fraction(keep)


def requested_pairs(capacity: Capacity, routing: Routing) -> Routing:
    """The pairs that ask for a slot: under expert choice, every token with every expert; else the chosen pairs."""
    everyone = isinstance(capacity, LeakyCapacity) and capacity.priority == "leaky-expert-choice"
    return with_all_experts(routing) if everyone else routing


def leaky_queue_positions(routing: Routing, priority: Priority) -> Int[Array, "B T K"]:
    """The place of each pair in its expert's queue, from 0, by a rule that leaks (see `LeakyCapacity`)."""
    experts = routing.logits.shape[-1]
    if priority == "leaky-choice-major":
        return _choice_major_positions(routing.expert_index, routing.valid, experts)
    # The other two rules sort tokens by a score, the best first. An invalid token comes last.
    if priority == "leaky-batch-priority":
        order = _ranking(jnp.where(routing.valid, routing.probs.max(-1), -1))
        sorted_experts = jnp.take_along_axis(routing.expert_index, order[..., None], axis=1)
        sorted_valid = jnp.take_along_axis(routing.valid, order, axis=1)
        position = _choice_major_positions(sorted_experts, sorted_valid, experts)
        return jnp.take_along_axis(position, jnp.argsort(order, axis=1)[..., None], axis=1)
    score = jnp.where(routing.valid[..., None], routing.probs, -1)
    return jnp.argsort(_ranking(score), axis=1)


def _choice_major_positions(
    expert: Int[Array, "B T K"], valid: Bool[Array, "B T"], experts: int
) -> Int[Array, "B T K"]:
    """The place of each pair in its expert's queue, where all first choices come before all second choices."""
    hits = jax.nn.one_hot(expert, experts, dtype=jnp.int32) * valid[..., None, None]
    batch, tokens, top_k, _ = hits.shape
    queue = hits.swapaxes(1, 2).reshape(batch, top_k * tokens, experts)
    before = (jnp.cumsum(queue, axis=1) - queue).reshape(batch, top_k, tokens, experts).swapaxes(1, 2)
    return jnp.take_along_axis(before, expert[..., None], axis=-1)[..., 0]


def _ranking(score: Array) -> Array:
    """Positions along axis 1, sorted from the largest score to the smallest. Of equal scores, the earlier position
    comes first."""
    return jnp.argsort(-jax.lax.stop_gradient(score), axis=1, stable=True)


def with_all_experts(routing: Routing) -> Routing:
    """The routing of expert choice: every token asks every expert for a slot (K = E). The gate is p."""
    batch, tokens, experts = routing.logits.shape
    every = jnp.broadcast_to(jnp.arange(experts), (batch, tokens, experts))
    gate = jnp.where(routing.valid[..., None], routing.probs, jnp.nan)
    return routing._replace(expert_index=every, gate=gate)


@dataclass(frozen=True)
class ReversedChunks(Capacity):
    """A leak between neighbours: chunks of tokens in their order, but within a chunk the later tokens first.

    A token can lose its slot to a token at most `chunk` - 1 positions later. The rules above act over any distance, so
    they are much easier to find.
    """

    chunk: int = 2

    def trace(self, routing: Routing) -> QueuedPairs:
        # Reversing the chunks twice gives the old order back.
        order = reversed_order(routing.valid.shape[1], self.chunk)
        experts = routing.logits.shape[-1]
        position = queue_positions(routing.expert_index[:, order], routing.valid[:, order], experts)[:, order]
        return QueuedPairs(position, (position < self.slots) & routing.valid[..., None])


def reversed_order(tokens: int, chunk: int) -> np.ndarray:
    """The positions 0 to `tokens` - 1, reversed within each chunk. The last chunk may be shorter."""
    return np.concatenate([np.arange(first, min(first + chunk, tokens))[::-1] for first in range(0, tokens, chunk)])


def leaky_moe(capacity: Callable[[int], Capacity]) -> type[MoE]:
    """An MoE layer that trains with `capacity(slots)`, such as `partial(LeakyCapacity, priority=...)`."""

    class LeakyMoE(MoE):
        def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
            chosen = super().dispatch_for(mode, batch, tokens)
            return capacity(chosen.slots) if isinstance(chosen, Capacity) else chosen

    return LeakyMoE
