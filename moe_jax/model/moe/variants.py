"""Routing variants that are off by default: noise, jitter, and priorities that leak the future.

Noise and jitter act in training only, and each sequence draws with a key of its own. The `leaky-` priorities exist to
be compared with the token-major priority, and to test that the causality certificate finds them.
Chapter 12 of `foundation` derives why they leak.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import Priority
from moe_jax.model.moe.dispatch import Capacity, QueuedPairs
from moe_jax.model.moe.router import Routing
from moe_jax.model.precision import at_least_float32
from moe_jax.system.random_keys import draw_each


def jittered(x: Float[Array, "B T D"], keys: Key[Array, " B"], amount: float) -> Float[Array, "B T D"]:
    """The router's input times uniform numbers from [1 - amount, 1 + amount] (Fedus et al. 2021, appendix C).

    Computed in at least float32, because bfloat16 has only four numbers between 0.99 and 1.01.
    """
    x = x.astype(at_least_float32(x.dtype))
    return x * draw_each(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, 1 - amount, 1 + amount), keys)


def noisy(logits: Float[Array, "B T E"], keys: Key[Array, " B"], deviation: float) -> Float[Array, "B T E"]:
    """Noisy top K: Gaussian noise on the logits (Shazeer et al. 2017, equation 4, with the constant deviation of
    Riquelme et al. 2021, section 2.1)."""
    return logits + deviation * draw_each(lambda key: jax.random.normal(key, logits.shape[1:], logits.dtype), keys)


@dataclass(frozen=True)
class LeakyCapacity(Capacity):
    """Every expert has `slots` slots. Under these rules a later token can take a slot from an earlier token.

    leaky-choice-major      all first choices, then all second choices (Lepikhin et al. 2020, algorithm 1)
    leaky-batch-priority    as leaky-choice-major, but tokens by their largest probability, not by position (Riquelme et
                            al. 2021, section 4)
    leaky-expert-choice     each expert takes the C tokens that like it most (Zhou et al. 2022, section 3.2)
    """

    priority: Priority = "leaky-choice-major"

    def requested_pairs(self, routing: Routing) -> Routing:
        """The pairs that ask for a slot: under expert choice, every token with every expert; else the chosen pairs."""
        return with_all_experts(routing) if self.priority == "leaky-expert-choice" else routing

    def trace(self, routing: Routing) -> QueuedPairs:
        requests = self.requested_pairs(routing)
        position = leaky_queue_positions(requests, self.priority)
        return QueuedPairs(position, (position < self.slots) & requests.valid[..., None])

    def drop_fraction(self, keep: Bool[Array, "B T K"]) -> Float[Array, " B"]:
        """Under expert choice, the share of tokens that no expert took. Otherwise the share of dropped pairs."""
        if self.priority == "leaky-expert-choice":
            keep = keep.any(-1)
        return super().drop_fraction(keep)


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
