"""One MoE layer as a plain function of its parameters, for code that compiles it, counts its operations or times it."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.moe.layer import Mode, MoE, build_layer

type LayerFunction = Callable[[dict[str, Any], jax.Array], jax.Array]
"""(parameters, x [B, T, D]) -> y [B, T, D], in training mode."""


def layer_function(config: ModelConfig, moe: type[MoE] = MoE) -> tuple[LayerFunction, dict[str, Any]]:
    """The layer as a function, and its initial parameters."""
    return _function(_initial_layer(config, moe))


def layer_shapes(config: ModelConfig, moe: type[MoE] = MoE) -> tuple[LayerFunction, dict[str, Any]]:
    """The layer as a function, and the shapes of its parameters. Allocates nothing."""
    return _function(nnx.eval_shape(lambda: _initial_layer(config, moe)))


def _initial_layer(config: ModelConfig, moe: type[MoE]) -> MoE:
    return build_layer(config, nnx.Rngs(params=jax.random.key(0)), moe)


def _function(layer: MoE) -> tuple[LayerFunction, dict[str, Any]]:
    graphdef, state = nnx.split(layer, nnx.Param)

    def moe_layer(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, nnx.State(jax.tree.map(lambda p: p, params)))(x, Mode.TRAIN)[0]

    return moe_layer, nnx.to_pure_dict(state)


def with_gradients(forward: LayerFunction) -> Callable[..., Any]:
    """(params, x, cotangent) -> (y, the gradients of parameters and x): what a training step needs of a layer."""

    def run(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, pull(cotangent)

    return run
