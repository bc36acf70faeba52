"""What checks are made of: random draws seeded by name, functions with their constants, and how far a choice is from
another one."""

import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundation.parity import Check, OracleCheck, as_jax
from foundation.router import RouterCache


def gradient(
    forward: Callable[..., Any],
    case: str,
    inputs: tuple,
    *constants: Any,
    operation: str = "",
    backward: Callable[..., Any] | None = None,
    outputs: tuple[str, ...] = (),
    after_cache: tuple = (),
    **options: Any,
) -> Check:
    """A check of NAME_forward and of NAME_backward in the same module; the operation is NAME, unless it is given.

    `constants` follow the inputs of the forward pass. It gives one array, or several named `outputs`, and then the
    backward pass takes their cotangents one by one. `after_cache` are its further arguments, `options` fields of
    `Check`.
    """
    name = forward.__name__.removesuffix("_forward")
    back = backward or getattr(sys.modules[forward.__module__], f"{name}_backward")
    constants = as_jax(constants)

    def with_constants(*inputs: Any) -> tuple[Any, Any]:
        out, cache = forward(*inputs, *constants)
        return tuple(getattr(out, output) for output in outputs) if outputs else out, cache

    def one_by_one(d_out: Any, cache: Any) -> Any:
        return back(*(d_out if outputs else (d_out,)), cache, *after_cache)

    return Check(operation or name, case, with_constants, one_by_one, inputs, **options)


def answer(
    function: Callable[..., Any],
    case: str,
    oracle: Callable[..., Any],
    inputs: tuple = (),
    *constants: Any,
    operation: str = "",
) -> OracleCheck:
    """A check of a function beside an oracle; of a NAME_forward without its cache."""
    name = function.__name__.removesuffix("_forward")
    alone = function if name == function.__name__ else lambda *arguments: function(*arguments)[0]
    return OracleCheck(operation or name, case, alone, oracle, inputs, as_jax(constants))


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

    def like(self, init: Callable[..., Any], *arguments: Any) -> Any:
        """Parameters of the shapes that `init` gives, of standard deviation 1/2; those of the norms are around 1. So no
        bias is 0.

        `init` is only traced. To run it would compile each of its random draws.
        """

        def drawn(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
            return mean + self.normal(*leaf.shape, std=0.5)

        return jax.tree.map_with_path(drawn, jax.eval_shape(lambda: init(jax.random.key(0), *arguments)))


def projection(draws: Draws, inputs: int, outputs: int, bias: bool) -> dict:
    """A linear map of attention."""
    kernel = {"kernel": draws.normal(inputs, outputs, std=0.5)}
    return kernel | {"bias": draws.normal(outputs)} if bias else kernel


def router_margin(top_k: int) -> Callable[[Any], jax.Array]:
    """A function of a cache: how far the routers in it are from another choice, in logits."""

    def margin(cache: Any) -> jax.Array:
        leaves = jax.tree.leaves(cache, is_leaf=lambda part: isinstance(part, RouterCache))
        products = [leaf.linear for leaf in leaves if isinstance(leaf, RouterCache)]
        return jnp.min(jnp.stack([jnp.min(gaps(x @ kernel)) for x, kernel, _ in products]))

    def gaps(logits: jax.Array) -> jax.Array:
        """Between a token's K-th and (K+1)-th logit: finite differences mean something while no step is as large."""
        if top_k == logits.shape[-1]:
            return jnp.array(jnp.inf)
        largest, _ = jax.lax.top_k(logits, top_k + 1)
        return largest[..., -2] - largest[..., -1]

    return margin
