"""Routers that spread tokens evenly, so that no number depends on how a router was trained or drawn."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp

from moe_jax.model.moe import MoE
from moe_jax.model.routing import Routing


@contextlib.contextmanager
def uniform_routing() -> Iterator[None]:
    """In models that are traced within, choice k of token n is expert (n*K + k) mod E, whatever the router says.

    Tokens are numbered through the batch. The router is computed all the same, and its gates are those of the choices
    that it would have made: what a pass costs stays what it is, but for who has how much to do.
    """
    route = MoE.route

    def evenly(self: MoE, x: jax.Array, key: jax.Array | None = None) -> Routing:
        routing = route(self, x, key)
        pairs = jnp.arange(routing.expert.size, dtype=routing.expert.dtype)
        return routing._replace(expert=(pairs % self.config.experts).reshape(routing.expert.shape))

    with mock.patch.object(MoE, "route", evenly):
        yield
