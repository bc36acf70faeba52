"""Low-rank adapters (Hu et al. 2021, "LoRA"): x W becomes x W + s (x A) B, with s = alpha / rank.

    attention    qkv and out, of rank R
    experts      each expert has A and B of its own, of rank max(1, R / K): a token passes through K experts, so it
                 meets about R in all. A shared expert and a dense network, which every token meets, have rank R.
    router       with `train_router`, a matrix that is added to it; the balance biases stay as they are

A is random and B is 0, so the adapted model starts with the function of the model, bit for bit. The adapters are a tree
beside the parameters. They have the names of their matrices: `blocks.0.attention.qkv` has
`blocks.0.attention.qkv_lora.a` and `.b`. Training multiplies with A and B, so it needs no gradient of W. Everything
else works on `merged` weights, W + s A B. Chapter 14 of `foundation` derives the gradients.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from moe_jax.model.kernels.matmul import matmul
from moe_jax.model.precision import at_least_float32

type Adapters = dict[Any, Any]

SUFFIX, DELTA = "_lora", "router_delta"


class LoraShape(NamedTuple):
    """The size of the adapters of a model."""

    rank: int
    scale: float
    """s = alpha / rank, the same for all adapters."""
    train_router: bool

    @classmethod
    def of(cls, config: TrainConfig) -> "LoraShape | None":
        """The adapters of a configuration, or None if it trains the whole model."""
        return cls(config.lora_rank, config.lora_scale, config.train_router) if config.lora_rank else None

    def expert_rank(self, model: ModelConfig) -> int:
        """The rank for one of the routed experts."""
        return max(1, self.rank // model.routing.top_k)


class LowRank(nnx.Module):
    """s (x A) B. Parameters: a `[*E, D, R]`, b `[*E, R, F]`."""

    def __init__(self, weight: nnx.Param, rank: int, scale: float) -> None:
        *experts, inputs, outputs = weight[...].shape
        self.scale = scale
        self.a = nnx.Param(jnp.zeros((*experts, inputs, rank)))
        self.b = nnx.Param(jnp.zeros((*experts, rank, outputs)))

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N F"]:
        return self.scale * matmul(matmul(x, self.a[...]), self.b[...])

    def grouped(
        self, rows: Float[Array, "G N D"], further_expert: Int[Array, " further"] | None
    ) -> Float[Array, "G N F"]:
        """The same for groups of rows, each with the A and B of its expert (`grouped_matmul`)."""
        return self.scale * grouped_matmul(
            grouped_matmul(rows, self.a[...], further_expert), self.b[...], further_expert
        )


def add_adapters(model: Any, lora: LoraShape) -> None:
    """Give a model its adapters, all zeros (`initial_adapters` has their first values)."""

    def adapt(module: nnx.Module, names: tuple[str, ...], rank: int) -> None:
        for name in names:
            if hasattr(module, name):
                setattr(module, name + SUFFIX, LowRank(getattr(module, name), rank, lora.scale))

    matrices = ("w_in", "w_gate", "w_out")
    for block in model.blocks:
        adapt(block.attention, ("qkv", "out"), lora.rank)
        routed = model.config.dense == "none"
        adapt(block.ffn.experts, matrices, lora.expert_rank(model.config) if routed else lora.rank)
        if routed and block.ffn.has_shared:
            adapt(block.ffn.shared, matrices, lora.rank)
        if lora.train_router:
            block.ffn.router_delta = nnx.Param(jnp.zeros(block.ffn.router[...].shape))


def adapters_in(params: dict[Any, Any]) -> Adapters:
    """The adapters among the parameters of an adapted model."""
    inside: Adapters = {}
    for name, value in params.items():
        if str(name).endswith(SUFFIX) or name == DELTA:
            inside[name] = value
        elif isinstance(value, dict) and (inner := adapters_in(value)):
            inside[name] = inner
    return inside


def adapted(params: dict[Any, Any], adapters: Adapters) -> dict[Any, Any]:
    """The parameters of an adapted model: those of the model and the adapters in one tree."""
    joined = dict(params)
    for name, value in adapters.items():
        joined[name] = adapted(params[name], value) if name in params else value
    return joined


def initial_adapters(shapes: Adapters, key: Key[Array, ""]) -> Adapters:
    """Each A normal with variance 1 / D, everything else 0, in float32."""

    def draw(path: jax.tree_util.KeyPath, leaf: Any, number: int) -> Array:
        if not _name(path).endswith(".a"):
            return jnp.zeros(leaf.shape, jnp.float32)
        return jax.random.normal(jax.random.fold_in(key, number), leaf.shape) * (1 / math.sqrt(leaf.shape[-2]))

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    return tree.unflatten([draw(path, leaf, number) for number, (path, leaf) in enumerate(leaves)])


def merge_named(
    weights: Mapping[str, Any], adapters: Mapping[str, Any], scale: float, product: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    """The weights with the adapters added, by name, in the dtype of each weight. `product` multiplies A and B. The sum
    is made in at least float32."""
    sums = dict(weights)
    for name, value in adapters.items():
        if name.endswith(f"{SUFFIX}.a"):
            target = name.removesuffix(f"{SUFFIX}.a")
            update = scale * product(value, adapters[f"{target}{SUFFIX}.b"])
        elif name.endswith(DELTA):
            target, update = name.removesuffix("_delta"), value
        else:
            continue
        weight = sums[target]
        sums[target] = (weight.astype(at_least_float32(weight.dtype)) + update).astype(weight.dtype)
    return sums


@partial(jax.jit, static_argnames="scale")
def merged(params: dict[Any, Any], adapters: Adapters, scale: float) -> dict[Any, Any]:
    """The parameters of the plain model that computes what the adapted model does: W + s A B."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    added = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)}
    named = {_name(path): leaf for path, leaf in leaves}
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return tree.unflatten(list(merge_named(named, added, scale, product).values()))


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
