"""GShard's dispatch by one-hot masks and einsums, which the tests compare the dispatch by capacity with."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.model.moe.dispatch import Capacity, Dispatch, QueuedPairs, drop_fraction
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing


@dataclass(frozen=True)
class OneHot:
    """GShard's dispatch and combine masks (Lepikhin et al. 2020, algorithm 1). `capacity` gives the queue.

    dispatch = einsum("btec,btd->ebcd"), combine = einsum("btec,ebcd->btd"). For each sequence a mask has T x E x C
    numbers, and each einsum takes 2 x T x E x C x D floating-point operations.
    """

    capacity: Capacity

    def masks(self, routing: Routing) -> tuple[Float[Array, "B T E C"], Float[Array, "B T E C"]]:
        """The mask that copies tokens into slots, and the mask that sums slots with their gates."""
        queued = self.capacity.trace(routing)
        experts, dtype = routing.logits.shape[-1], routing.probs.dtype
        slots = jax.nn.one_hot(queued.position, self.capacity.slots, dtype=dtype)  # a position beyond C is all zeros
        choice = jax.nn.one_hot(routing.expert_index, experts, dtype=dtype) * routing.valid[..., None, None]
        gate = jnp.where(routing.valid[..., None], routing.gate, 0)
        return (
            jnp.einsum("btke,btkc->btec", choice, slots),
            jnp.einsum("btk,btke,btkc->btec", gate, choice, slots),
        )

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        to_slots, from_slots = self.masks(routing)
        with jax.named_scope("dispatch"):
            rows = jnp.einsum("btec,btd->ebcd", to_slots.astype(x.dtype), x)
        with jax.named_scope("experts"):
            count, batch, slots, width = rows.shape
            rows = experts(rows.reshape(count, batch * slots, width)).reshape(rows.shape)
        with jax.named_scope("combine"):
            y = jnp.einsum("btec,ebcd->btd", from_slots.astype(x.dtype), rows)
        chosen = jax.nn.one_hot(routing.expert_index, count, dtype=to_slots.dtype)
        keep = jnp.einsum("btke,btec->btk", chosen, to_slots) > 0.5
        return y, drop_fraction(keep)

    def trace(self, routing: Routing) -> QueuedPairs:
        return self.capacity.trace(routing)


class OneHotMoE(MoE):
    """An MoE layer that trains by `OneHot`."""

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        chosen = super().dispatch_for(mode, batch, tokens)
        return OneHot(chosen) if isinstance(chosen, Capacity) else chosen
