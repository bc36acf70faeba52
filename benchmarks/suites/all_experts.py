"""The layer in which every expert computes every token: what the dispatches are compared with. No run can choose it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.model.moe.dispatch import Dispatch, QueuedPairs, unlimited
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing


@dataclass(frozen=True)
class AllExperts:
    """Every expert computes every token. The chosen experts' outputs are summed with their gates. Drops nothing."""

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"]]:
        count = routing.logits.shape[-1]
        flat = x.reshape(-1, x.shape[-1])
        with jax.named_scope("experts"):
            rows = experts(jnp.broadcast_to(flat, (count, *flat.shape)))
        gate = jnp.where(routing.valid[..., None], routing.gate, 0)
        weight = (jax.nn.one_hot(routing.expert_index, count, dtype=gate.dtype) * gate[..., None]).sum(-2)
        y = jnp.einsum("ne,end->nd", weight.reshape(-1, count).astype(rows.dtype), rows)
        return y.reshape(x.shape), jnp.zeros(len(x))

    def trace(self, routing: Routing) -> QueuedPairs:
        return unlimited(routing)


class AllExpertsMoE(MoE):
    """The layer, which trains by `AllExperts`."""

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        return AllExperts() if mode is Mode.TRAIN else super().dispatch_for(mode, batch, tokens)
