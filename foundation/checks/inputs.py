"""Inputs of the checks: random draws seeded by name, and how far a router's choice is from another one."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from foundation import router
from foundation.parity import as_jax


class Draws:
    """Random inputs of one check, seeded by its name, so that a new check changes no other.

    They are NumPy arrays, and a check turns them into jax arrays: arithmetic on them on the way compiles nothing.
    """

    def __init__(self, name: str) -> None:
        self.generator = np.random.default_rng(zlib.crc32(name.encode()))

    def normal(self, *shape: int, std: float = 1.0) -> np.ndarray:
        """Normal entries."""
        return std * self.generator.standard_normal(shape)

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """Integers in [0, high)."""
        return self.generator.integers(0, high, shape)

    def keep(self, *shape: int) -> np.ndarray:
        """A dropout mask of rate 1/4."""
        return self.generator.random(shape) > 0.25

    def like(self, init: Callable[[], Any], std: float) -> Any:
        """Parameters of the shapes that `init` gives, all normal, those of the norms around 1. So no bias is 0.

        `init` is only traced. To run it would compile each of its random draws.
        """

        def drawn(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
            return mean + self.normal(*leaf.shape, std=std)

        return jax.tree.map_with_path(drawn, jax.eval_shape(init))


def router_margin(cache: router.RouterCache, top_k: int) -> jax.Array:
    """How far a router that has run is from another choice: `top_k_margin` of its logits."""
    x, kernel, _ = cache.linear
    return router.top_k_margin(x @ kernel, top_k)


def filled_with(forward: Callable, *constants: Any) -> Callable:
    """`forward` with the arguments after the differentiated ones filled in."""
    constants = as_jax(constants)

    def filled(*inputs: Any) -> tuple[Any, Any]:
        return forward(*inputs, *constants)

    return filled
