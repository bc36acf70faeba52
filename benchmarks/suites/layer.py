"""`benchmark.py moe`: does one MoE layer take the time that its active parameters say?

All candidates run forward and backward in one process, with float32 weights: the layer as it trains, and without drops
(`--dispatch blocks`); a dense feed-forward network with the same active arithmetic, in three layouts; all experts on
all tokens. `certify` counts the operations of the compiled layer.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from moe_jax.certify.arithmetic import layer_function, with_gradients
from moe_jax.certify.formulas import expert_flops, router_flops
from moe_jax.config import ModelConfig
from moe_jax.model.kernels.matmul import matmul
from moe_jax.system import machine
from moe_jax.system.machine import Times, alternate

from .all_experts import AllExpertsMoE
from .request import BenchmarkRequest, matmul_rate_in, print_numbers, times_table

BATCH = 8


def with_reused_output(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    """`function(*operands)` as a function without arguments. Each call writes its result into the memory of the
    previous result.

    A training step reuses memory in the same way. With new memory for every call, the time would include page faults:
    a third of the time of such a call on a CPU.
    """
    run = jax.jit(lambda old, *a: function(*a), donate_argnums=0, keep_unused=True)
    held = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *operands))]

    def call() -> Any:
        held[0] = run(held[0], *operands)
        return held[0]

    return call


def dense_layouts(config: ModelConfig) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Dense networks with the activation and the arithmetic of one token's experts: K and the shared ones.

    plain                x of shape [B, T, D]
    transposed weights   the first weights stored transposed, [F, D]; x reshaped to [B*T, D]
    our matmul           the model's own `matmul`, which may transpose the rows for the gradient of the weights

    The weights are (the weights of the first products, w_out), in the order of `Experts`.
    """
    width, hidden = config.width, (config.routing.top_k + config.shared_experts) * config.expert_hidden
    keys = (1, 5) if config.activation == "swiglu" else (1,)
    first = [jax.random.normal(jax.random.key(key), (width, hidden)) / math.sqrt(width) for key in keys]
    w_out = jax.random.normal(jax.random.key(2), (hidden, width)) / math.sqrt(hidden)

    def act(h: list[jax.Array]) -> jax.Array:
        return jax.nn.silu(h[1]) * h[0] if config.activation == "swiglu" else jax.nn.gelu(h[0])

    def plain(w: Any, x: jax.Array) -> jax.Array:
        return act([x @ w_in for w_in in w[0]]) @ w[1]

    def transposed(w: Any, x: jax.Array) -> jax.Array:
        h = act([jnp.einsum("nd,fd->nf", x.reshape(-1, width), w_in) for w_in in w[0]])
        return jnp.einsum("nf,fd->nd", h, w[1]).reshape(x.shape)

    def own(w: Any, x: jax.Array) -> jax.Array:
        return matmul(act([matmul(x.reshape(-1, width), w_in) for w_in in w[0]]), w[1]).reshape(x.shape)

    return {
        "dense, plain": (plain, (first, w_out)),
        "dense, transposed weights": (transposed, ([w_in.T for w_in in first], w_out)),
        "dense, our matmul": (own, (first, w_out)),
    }


def active_flops(config: ModelConfig, tokens: int) -> int:
    """Forward operations of the layer on this many tokens, if no slot is empty and no choice is dropped."""
    return expert_flops(config, tokens * (config.routing.top_k + config.shared_experts)) + router_flops(config, tokens)


def benchmark_layer(config: ModelConfig, rounds: int = 15) -> tuple[dict[str, float], dict[str, Times]]:
    """The ratios of `benchmark.py moe` for one layer, and the times from which they are computed."""
    shape = (BATCH, config.seq_len, config.width)
    x, cotangent = (jax.random.normal(jax.random.key(n), shape) for n in (3, 4))
    functions = {
        **dense_layouts(config),
        "MoE": layer_function(config),
        "MoE, no drops": layer_function(config.with_routing(dispatch="blocks")),
        "all experts": layer_function(config, AllExpertsMoE),
    }
    candidates: dict[str, Callable[[], Any]] = {
        name: with_reused_output(with_gradients(function), weights, x, cotangent)
        for name, (function, weights) in functions.items()
    }
    products = machine.matmuls("float32")
    times = alternate(candidates | {name: run for name, (run, _) in products.items()}, rounds)
    rate, moe = matmul_rate_in(times, products), times["MoE"].median
    best = min(t.median for name, t in times.items() if name.startswith("dense"))
    return {
        "wall_over_dense_active": moe / times["dense, plain"].median,
        "wall_over_best_dense": moe / best,
        "dropless_wall_over_best_dense": times["MoE, no drops"].median / best,
        "dense_all_over_wall": times["all experts"].median / moe,
        "layer_share_of_matmul_peak": 3 * active_flops(config, BATCH * config.seq_len) / moe / rate,
        "matmul_flops_per_second": rate,
    }, times


def moe(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """The suite: one MoE layer beside dense layers, by time."""
    model = request.config.model
    numbers, times = benchmark_layer(model, request.rounds)
    title = f"one MoE layer on {BATCH} x {model.seq_len} tokens, forward and backward, in float32"
    console.print(times_table(title, times), "MoE:")
    print_numbers(console, numbers)
    return numbers
