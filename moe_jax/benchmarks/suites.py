"""The suites of `benchmark.py`. Each suite measures, prints tables, and returns its numbers."""

from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from moe_jax.benchmarks import decoding, layer, peers
from moe_jax.benchmarks.dense_baselines import train
from moe_jax.benchmarks.request import WORDS, BenchmarkRequest, print_numbers, times_table
from moe_jax.benchmarks.serving import serve
from moe_jax.model.transformer import create, split
from moe_jax.system import machine
from moe_jax.system.machine import alternate


def moe(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """One MoE layer beside dense layers, by time."""
    model = request.config.model
    numbers, times = layer.benchmark_layer(model, request.rounds)
    title = f"one MoE layer on {layer.BATCH} x {model.seq_len} tokens, forward and backward, in float32"
    console.print(times_table(title, times), "MoE:")
    print_numbers(console, numbers)
    return numbers


def decode(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """Prefill, cached decoding, and an uncached forward pass of four tokens."""
    config = request.config
    _, params = split(create(config.model, jax.random.key(0)))
    model = config.model
    read, read_bytes = machine.memory_read_benchmark()
    times = alternate(
        {
            "memory read": read,
            "decode, batch 1": decoding.token_call(model, params),
            "decode, batch 32": decoding.batch_call(model, params, 32),
            "prefill, 128 tokens": decoding.prefill_call(model, params, 128),
            "uncached forward, 4 tokens": decoding.uncached_call(model, params),
        },
        3 * request.rounds,
    )
    bandwidth = read_bytes / times["memory read"].median
    bound = decoding.active_bytes(config) / bandwidth
    console.print(times_table("decoding", times))
    numbers = {
        "decode_share_of_bandwidth_bound": bound / times["decode, batch 1"].median,
        "memory_bytes_per_second": bandwidth,
    }
    print_numbers(console, numbers)
    return numbers | {
        **{f"decode_ms_per_token_batch{b}": times[f"decode, batch {b}"].median * 1e3 for b in (1, 32)},
        "prefill_128_ms": times["prefill, 128 tokens"].median * 1e3,
        "uncached_4_token_ms": times["uncached forward, 4 tokens"].median * 1e3,
    }


def against_peers(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """Our model compared with Mixtral of transformers."""
    numbers, times = peers.compare(request.config, request.batch_size, request.rounds)
    console.print(times_table("our model, and Mixtral in PyTorch with its two implementations of experts", times))
    print_numbers(console, {name: value for name, value in numbers.items() if name in WORDS and value is not None})
    return numbers


SUITES: dict[str, Callable[[Console, BenchmarkRequest], dict[str, Any]]] = {
    "moe": moe,
    "train": train,
    "decode": decode,
    "peers": against_peers,
    "serve": serve,
}
