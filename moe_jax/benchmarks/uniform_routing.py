"""Routers that spread tokens evenly, so that no measured number depends on the weights of a router."""

import jax
import jax.numpy as jnp

from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.router import Routing


class UniformMoE(MoE):
    """An MoE layer in which choice k of token n goes to expert (n*K + k) mod E, and not to the router's choice.

    n counts all tokens of the batch. The router is still computed, and the gates are the gates of its own choices. So
    the cost of the router is included, and only the load of the experts is fixed.
    """

    def route(self, x: jax.Array, key: jax.Array | None = None) -> Routing:
        routing = super().route(x, key)
        pairs = jnp.arange(routing.expert_index.size, dtype=routing.expert_index.dtype)
        experts = routing.logits.shape[-1]
        return routing._replace(expert_index=(pairs % experts).reshape(routing.expert_index.shape))
