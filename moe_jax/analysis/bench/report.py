"""The parts of `benchmark.py`: each measures, prints a table that a person can read, and returns its numbers."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from moe_jax.analysis import gpu_plan
from moe_jax.analysis.bench import decoding, feeding, layer, machine, peers, saving
from moe_jax.analysis.bench.part import Ask, print_numbers, times_table
from moe_jax.analysis.bench.timing import alternate
from moe_jax.analysis.bench.training import Trainer, temporary_bytes
from moe_jax.analysis.bench.twins import train
from moe_jax.analysis.gpu_memory import load_target
from moe_jax.model.transformer import create, split


def moe(console: Console, ask: Ask) -> dict[str, Any]:
    """One layer and the whole step: compiled arithmetic, wall clock, memory."""
    model = ask.config.model
    console.print(
        f"one MoE layer: D {model.width}, F {model.expert_hidden}, E {model.experts}, K {model.top_k}, "
        f"capacity factor {model.capacity_factor:g}, {layer.BATCH} x {model.seq_len} tokens, float32; "
        "forward and backward"
    )
    numbers, times = layer.benchmark_layer(model, ask.rounds)
    console.print(times_table("forward and backward of one layer", times))
    numbers |= _step_numbers(console, ask)
    print_numbers(console, numbers)
    return numbers


def _step_numbers(console: Console, ask: Ask) -> dict[str, Any]:
    memory = temporary_bytes(ask.config, ask.batch_size)
    trainer = Trainer.of(ask.config, ask.batch_size)
    products = machine.matmuls("float32")
    candidates = {"training step": trainer, **{name: run for name, (run, _) in products.items()}}
    times = alternate(candidates, max(3, ask.rounds // 2))
    rate = max(flops / times[name].median for name, (_, flops) in products.items())
    console.print(times_table(f"the whole training step, {ask.batch_size} x {ask.config.model.seq_len} tokens", times))
    share = trainer.active_flops / times["training step"].median / rate
    return {"train_step_share_of_matmul_peak": share, **memory}


def decode(console: Console, ask: Ask) -> dict[str, Any]:
    """Prefill and cached decoding, and the uncached forward of four tokens."""
    config = ask.config
    _, params = split(create(config.model, jax.random.key(0)))
    read, read_bytes = machine.read()
    loops = {f"decode, batch {b}": decoding.DecodeLoop(config, params, b) for b in (1, 8, 32)}
    times = alternate(
        {
            "memory read": read,
            **loops,
            "prefill, 128 tokens": decoding.prefill_call(config, params, 128),
            "uncached forward, 4 tokens": decoding.uncached_call(config, params),
        },
        3 * ask.rounds,
    )
    bandwidth = read_bytes / times["memory read"].median
    bound = decoding.active_bytes(config) / bandwidth
    console.print(times_table("decoding", times))
    numbers = {
        "decode_share_of_bandwidth_bound": bound / times["decode, batch 1"].median,
        **{f"decode_ms_per_token_batch{b}": times[f"decode, batch {b}"].median * 1e3 for b in (1, 8, 32)},
        "prefill_128_ms": times["prefill, 128 tokens"].median * 1e3,
        "uncached_4_token_ms": times["uncached forward, 4 tokens"].median * 1e3,
        "memory_bytes_per_second": bandwidth,
    }
    print_numbers(console, numbers)
    return numbers


def surroundings(console: Console, ask: Ask) -> dict[str, Any]:
    """What surrounds the step: tokenizing, batches, checkpoints."""
    texts, size = feeding.stories()
    tokenizers = feeding.tokenizers()
    if feeding.GPT2 not in tokenizers:
        console.print("left out: tokenizing by GPT-2's vocabulary, which cannot be had here")
    batch = f"a batch of {ask.batch_size} x {ask.config.model.seq_len}"
    calls: dict[str, Callable[[], Any]] = {
        f"tokenizing, {name}": partial(tokenizer.encode_batch, texts) for name, tokenizer in tokenizers.items()
    }
    times = alternate({**calls, batch: feeding.batch_call(ask.config, ask.batch_size)}, ask.rounds)
    speed = {name: size / 1e6 / t.median for name, t in times.items()}
    tokens = ask.batch_size * ask.config.model.seq_len
    console.print(
        times_table(
            f"{len(texts):,} stories of {size / 1e6:.1f} MB; and one batch",
            times,
            lambda name, t: f"{tokens / t.median:,.0f} tokens/s" if name == batch else f"{speed[name]:,.1f} MB/s",
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saving.measure(saving.make_state(ask.config), Path(folder), max(1, ask.rounds // 3))
    numbers = {
        f"tokenizing_{name}_MB_per_second".replace(" ", "_"): speed[f"tokenizing, {name}"] for name in tokenizers
    }
    numbers |= {"batch_ms": times[batch].median * 1e3, **checkpoint}
    print_numbers(console, numbers)
    return numbers


TARGETS = ("rtx3050-4gb", "quadro-t1000-4gb", "rtx3060-12gb")
"""Cards that `benchmark.py memory` plans for."""


def memory(console: Console, ask: Ask) -> dict[str, Any]:
    """The setting of the preset that fits each card; nothing runs. The preset's own batch is planned for."""
    table = Table(title="first setting that fits, by XLA's buffer plan", title_justify="left", box=None, padding=(0, 1))
    for name in ("card", "precision", "optimizer", "remat", "batch", "MiB", "of", "fits"):
        table.add_column(name, justify="right" if name in ("batch", "MiB", "of") else "left", no_wrap=True)
    found: dict[str, Any] = {}
    for name in TARGETS:
        target = load_target(name)
        plan = gpu_plan.verdict(list(gpu_plan.search(ask.config, target)), target).summary(target)
        found[name] = {key: value for key, value in plan.items() if key not in ("preset", "gpu")}
        yes = {True: "yes", False: "no"}
        table.add_row(
            *(name, plan["precision"], plan["optimizer"], yes[plan["remat"]]),
            *(
                f"{plan['micro_batch']} x {plan['grad_accum']}",
                f"{plan['total_mib']:,.0f}",
                f"{plan['budget_mib']:,.0f}",
                yes[plan["fits"]],
            ),
        )
    console.print(table)
    return found


def against_peers(console: Console, ask: Ask) -> dict[str, Any]:
    """Ours beside transformers' Mixtral."""
    numbers, times = peers.compare(ask.config, ask.batch_size, ask.rounds)
    console.print(times_table("ours, and Mixtral in PyTorch by its two implementations of experts", times))
    for name, value in numbers.items():
        if name.endswith("_ratio"):
            said = "as fast as theirs: ours is SLOWER" if value < 1 else "as fast as theirs"
            console.print(f"{name.removesuffix('_ratio')}: {value:.2f} x {said}")
    console.print()
    return numbers


PARTS: dict[str, Callable[[Console, Ask], dict[str, Any]]] = {
    "moe": moe,
    "train": train,
    "decode": decode,
    "surroundings": surroundings,
    "memory": memory,
    "peers": against_peers,
}
