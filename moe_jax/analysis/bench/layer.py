"""`benchmark.py moe`: does one MoE layer cost what its active parameters say?

Everything is compared within one run, forward and backward, with float32 weights: the layer as it trains, a dense
feed-forward network of the same active arithmetic in several layouts, all experts on all tokens, and the layer with
8 and 64 experts of which a token still takes K.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.analysis.accounting import bound_flops, expert_flops, router_flops
from moe_jax.analysis.bench import machine
from moe_jax.analysis.bench.timing import Times, alternate, recycled
from moe_jax.analysis.compiled import read_program
from moe_jax.config import ModelConfig
from moe_jax.model.moe import Mode, MoE
from moe_jax.model.products import product

BATCH = 8


def layer(config: ModelConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(function of parameters and x to y, parameters) of an MoE layer, its router as it is at the start."""
    graphdef, state = nnx.split(MoE(config, 1.0, nnx.Rngs(params=jax.random.key(0))), nnx.Param)

    def forward(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, nnx.State(jax.tree.map(lambda p: p, params)))(x, Mode.TRAIN)[0]

    return forward, nnx.to_pure_dict(state)


def with_gradients(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(params, x, cotangent) -> the gradients of parameters and x, and y: what a step needs of a layer."""

    def run(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, pull(cotangent)

    return run


def dense_layouts(config: ModelConfig) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Dense networks of the activation of the experts that a token passes, K and the shared ones, and of their
    arithmetic: plain, cut into a batched part an expert, with turned weights, and with the model's own products, whose
    gradients of the weights turn the rows. Weights are (the first products', w_out), in the order of `Experts`."""
    experts = config.top_k + config.shared_experts
    width, hidden = config.width, experts * config.expert_hidden
    keys = (1, 5) if config.activation == "swiglu" else (1,)
    first = [jax.random.normal(jax.random.key(key), (width, hidden)) / math.sqrt(width) for key in keys]
    w_out = jax.random.normal(jax.random.key(2), (hidden, width)) / math.sqrt(hidden)

    def act(h: list[jax.Array]) -> jax.Array:
        return jax.nn.silu(h[1]) * h[0] if config.activation == "swiglu" else jax.nn.gelu(h[0])

    def plain(w: Any, x: jax.Array) -> jax.Array:
        return act([x @ w_in for w_in in w[0]]) @ w[1]

    def flat(w: Any, x: jax.Array) -> jax.Array:
        return plain(w, x.reshape(-1, width)).reshape(x.shape)

    def parts(w: Any, x: jax.Array) -> jax.Array:
        h = act([jnp.einsum("nd,kdf->knf", x.reshape(-1, width), w_in) for w_in in w[0]])
        return jnp.einsum("knf,kfd->nd", h, w[1]).reshape(x.shape)

    def turned(w: Any, x: jax.Array) -> jax.Array:
        h = act([jnp.einsum("nd,fd->nf", x.reshape(-1, width), w_in) for w_in in w[0]])
        return jnp.einsum("nf,fd->nd", h, w[1]).reshape(x.shape)

    def own(w: Any, x: jax.Array) -> jax.Array:
        return product(act([product(x.reshape(-1, width), w_in) for w_in in w[0]]), w[1]).reshape(x.shape)

    cut = [w_in.reshape(width, experts, -1).swapaxes(0, 1) for w_in in first]
    return {
        "dense, plain": (plain, (first, w_out)),
        "dense, flat": (flat, (first, w_out)),
        "dense, in parts": (parts, (cut, w_out.reshape(experts, -1, width))),
        "dense, turned": (turned, ([w_in.T for w_in in first], w_out)),
        "dense, own products": (own, (first, w_out)),
    }


def active_flops(config: ModelConfig, tokens: int) -> int:
    """Forward operations of the layer on so many tokens, if no slot were empty and no choice dropped."""
    return expert_flops(config, tokens * (config.top_k + config.shared_experts)) + router_flops(config, tokens)


def compiled_flops(function: Callable[..., Any], *operands: Any) -> int:
    """Operations of the matrix products in the compiled program."""
    return read_program(jax.jit(function).lower(*operands).compile().as_text()).flops


def benchmark_layer(config: ModelConfig, rounds: int = 15) -> tuple[dict[str, float], dict[str, Times]]:
    """The ratios of `benchmark.py moe` that concern one layer, and the times behind them."""
    shape = (BATCH, config.seq_len, config.width)
    x, cotangent = (jax.random.normal(jax.random.key(n), shape) for n in (3, 4))
    forward, params = layer(config)
    candidates: dict[str, Callable[[], Any]] = {}
    for name, (function, weights) in dense_layouts(config).items():
        candidates[name] = recycled(with_gradients(function), weights, x, cotangent)
    candidates["MoE"] = recycled(with_gradients(forward), params, x, cotangent)
    for name, changes in {
        "all experts": {"dispatch": "dense"},
        "8 experts": {"experts": 8},
        "64 experts": {"experts": 64},
    }.items():
        other, weights = layer(dataclasses.replace(config, **changes))
        candidates[name] = recycled(with_gradients(other), weights, x, cotangent)
    products = machine.matmuls("float32")
    candidates |= {name: run for name, (run, _) in products.items()}
    times = alternate(candidates, rounds)
    rate = max(flops / times[name].median for name, (_, flops) in products.items())
    tokens = BATCH * config.seq_len
    active = active_flops(config, tokens)
    bound = bound_flops(config, BATCH)
    moe = times["MoE"].median
    dense = {name: t.median for name, t in times.items() if name.startswith("dense")}
    return {
        "flops_over_bound_forward": compiled_flops(forward, params, x) / bound,
        "flops_over_bound_grad": compiled_flops(with_gradients(forward), params, x, cotangent) / (3 * bound),
        "wall_over_dense_active": moe / dense["dense, plain"],
        "wall_over_best_dense": moe / min(dense.values()),
        "dense_all_over_wall": times["all experts"].median / moe,
        "wall_growth_8_to_64_experts": times["64 experts"].median / times["8 experts"].median,
        "layer_share_of_matmul_peak": 3 * active / moe / rate,
        "matmul_flops_per_second": rate,
    }, times
