"""`benchmark.py moe`: does one MoE layer cost what its active parameters say?

All candidates run forward and backward in one process, with float32 weights: the layer as it trains; a dense
feed-forward network with the same active arithmetic, in several layouts; all experts on all tokens; the layer with
8 and with 64 experts; and the layer without drops (`--dispatch blocks`). A token always chooses K experts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.benchmarks.request import matmul_rate_in
from moe_jax.config import ModelConfig
from moe_jax.model.costs import bound_flops, expert_flops, router_flops
from moe_jax.model.kernels.matmul import matmul
from moe_jax.model.moe.layer import AllExpertsMoE, MoE, layer_function, with_gradients
from moe_jax.system import machine
from moe_jax.system.hlo import read_program
from moe_jax.system.machine import Times, alternate, with_reused_output

BATCH = 8


def dense_layouts(config: ModelConfig) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Dense networks with the activation and the arithmetic of one token's experts: K and the shared ones.

    plain         x of shape [B, T, D]
    flat          x reshaped to [B*T, D]
    in parts      the hidden width cut into one part for each expert, as batched products
    turned        the first weights stored transposed, [F, D]
    own products  with the model's own `matmul`, which may transpose the rows for the gradient of the weights

    The weights are (the weights of the first products, w_out), in the order of `Experts`.
    """
    experts = config.routing.top_k + config.shared_experts
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
        return matmul(act([matmul(x.reshape(-1, width), w_in) for w_in in w[0]]), w[1]).reshape(x.shape)

    cut = [w_in.reshape(width, experts, -1).swapaxes(0, 1) for w_in in first]
    return {
        "dense, plain": (plain, (first, w_out)),
        "dense, flat": (flat, (first, w_out)),
        "dense, in parts": (parts, (cut, w_out.reshape(experts, -1, width))),
        "dense, transposed weights": (turned, ([w_in.T for w_in in first], w_out)),
        "dense, our matmul": (own, (first, w_out)),
    }


def active_flops(config: ModelConfig, tokens: int) -> int:
    """Forward operations of the layer on this many tokens, if no slot is empty and no choice is dropped."""
    return expert_flops(config, tokens * (config.routing.top_k + config.shared_experts)) + router_flops(config, tokens)


def compiled_flops(function: Callable[..., Any], *operands: Any) -> int:
    """Operations of the matrix products in the compiled program."""
    return read_program(jax.jit(function).lower(*operands).compile().as_text()).flops


def benchmark_layer(
    config: ModelConfig, rounds: int = 15, moe_class: type[MoE] = MoE
) -> tuple[dict[str, float], dict[str, Times]]:
    """The ratios of `benchmark.py moe` for one layer, and the times from which they are computed."""
    shape = (BATCH, config.seq_len, config.width)
    x, cotangent = (jax.random.normal(jax.random.key(n), shape) for n in (3, 4))
    forward, params = layer_function(config, moe_class)
    candidates: dict[str, Callable[[], Any]] = {}
    for name, (function, weights) in dense_layouts(config).items():
        candidates[name] = with_reused_output(with_gradients(function), weights, x, cotangent)
    candidates["MoE"] = with_reused_output(with_gradients(forward), params, x, cotangent)
    blocks = dataclasses.replace(config, routing=dataclasses.replace(config.routing, dispatch="blocks"))
    dropless = layer_function(blocks, moe_class)
    others = {
        "MoE, no drops": dropless,
        "all experts": layer_function(config, AllExpertsMoE),
        "8 experts": layer_function(dataclasses.replace(config, experts=8), moe_class),
        "64 experts": layer_function(dataclasses.replace(config, experts=64), moe_class),
    }
    for name, (other, weights) in others.items():
        candidates[name] = with_reused_output(with_gradients(other), weights, x, cotangent)
    products = machine.matmuls("float32")
    candidates |= {name: run for name, (run, _) in products.items()}
    times = alternate(candidates, rounds)
    rate = matmul_rate_in(times, products)
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
        "dropless_wall_over_best_dense": times["MoE, no drops"].median / min(dense.values()),
        "dropless_flops_over_ideal": compiled_flops(with_gradients(dropless[0]), dropless[1], x, cotangent)
        / (3 * active),
        "dense_all_over_wall": times["all experts"].median / moe,
        "wall_growth_8_to_64_experts": times["64 experts"].median / times["8 experts"].median,
        "layer_share_of_matmul_peak": 3 * active / moe / rate,
        "matmul_flops_per_second": rate,
    }, times
