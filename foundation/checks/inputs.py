"""Inputs of the checks: random draws seeded by name, kept clear of changes of the router's choice."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundation import router
from foundation.parity import COMPILER_OPTIONS, MARGIN


class Draws:
    """Random inputs of one check, seeded by its name, so that a new check changes no other."""

    def __init__(self, name: str, attempt: int = 0) -> None:
        self.generator = np.random.default_rng([zlib.crc32(name.encode()), attempt])

    def normal(self, *shape: int, std: float = 1.0) -> jax.Array:
        """Normal entries."""
        return jnp.asarray(std * self.generator.standard_normal(shape))

    def integers(self, high: int, *shape: int) -> jax.Array:
        """Integers in [0, high)."""
        return jnp.asarray(self.generator.integers(0, high, shape))

    def keep(self, *shape: int) -> jax.Array:
        """A dropout mask of rate 1/4."""
        return jnp.asarray(self.generator.random(shape) > 0.25)

    def like(self, tree: Any, std: float) -> Any:
        """The tree with normal noise added to every leaf, so that no scale is 1 and no bias 0."""
        return jax.tree.map(lambda leaf: leaf + self.normal(*leaf.shape, std=std), tree)


def choice_margin(x: jax.Array, kernel: jax.Array, top_k: int) -> jax.Array:
    """`top_k_margin` of a router with this input and this kernel."""
    return router.top_k_margin(x @ kernel, top_k)


def router_margin(cache: router.RouterCache, top_k: int) -> jax.Array:
    """The same, of a router that has run."""
    x, kernel, _ = cache.linear
    return choice_margin(x, kernel, top_k)


def clear_choice(name: str, draw: Callable[[Draws], tuple], margin_of: Callable[..., jax.Array]) -> tuple[tuple, float]:
    """The first draw whose top-K choices are all clear of a change by twice the required margin."""
    compiled = jax.jit(margin_of, compiler_options=COMPILER_OPTIONS)
    for attempt in range(100):
        inputs = draw(Draws(name, attempt))
        margin = float(compiled(*inputs))
        if margin > 2.0 * MARGIN:
            return inputs, margin
    raise ValueError(f"{name}: no draw with clear choices in 100")


def filled_with(forward: Callable, *constants: Any) -> Callable:
    """`forward` with the arguments after the differentiated ones filled in."""

    def filled(*inputs: Any) -> tuple[Any, Any]:
        return forward(*inputs, *constants)

    return filled
