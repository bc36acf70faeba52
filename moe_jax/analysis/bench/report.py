"""The parts of `benchmark.py`: each measures, prints a table that a person can read, and returns its numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from moe_jax.analysis import gpu_plan
from moe_jax.analysis.accounting import totals
from moe_jax.analysis.bench import card, decoding, layer, machine, peers
from moe_jax.analysis.bench.timing import Times, alternate
from moe_jax.analysis.bench.training import Trainer, temporary_bytes
from moe_jax.analysis.gpu_memory import load_target
from moe_jax.config import RunConfig
from moe_jax.model.transformer import create, split


def _times(title: str, times: dict[str, Times], extra: Callable[[str, Times], str] | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("candidate")
    for name in ("median ms", "spread", ""):
        table.add_column(name, justify="right")
    for name, t in times.items():
        table.add_row(name, f"{t.median * 1e3:,.2f}", f"{t.spread:.0%}", extra(name, t) if extra else "")
    return table


def _numbers(console: Console, numbers: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in numbers.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    console.print()


def moe(console: Console, config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """One layer and the whole step: compiled arithmetic, wall clock, memory."""
    model = config.model
    console.print(
        f"one MoE layer: D {model.width}, F {model.expert_hidden}, E {model.experts}, K {model.top_k}, "
        f"capacity factor {model.capacity_factor:g}, {layer.BATCH} x {model.seq_len} tokens, float32; "
        "forward and backward"
    )
    numbers, times = layer.benchmark_layer(model, rounds)
    console.print(_times("forward and backward of one layer", times))
    numbers |= _step_numbers(console, config, batch_size, max(3, rounds // 2))
    _numbers(console, numbers)
    return numbers


def _step_numbers(console: Console, config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    memory = temporary_bytes(config, batch_size)
    trainer = Trainer.of(config, batch_size)
    products = machine.matmuls("float32")
    times = alternate({"training step": trainer, **{name: run for name, (run, _) in products.items()}}, rounds)
    rate = max(flops / times[name].median for name, (_, flops) in products.items())
    console.print(_times(f"the whole training step, {batch_size} x {config.model.seq_len} tokens", times))
    share = trainer.active_flops / times["training step"].median / rate
    return {"train_step_share_of_matmul_peak": share, **memory}


def train(console: Console, config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """The static card, and the training step beside its dense twins."""
    console.print(_card_table(config, card.compute(config, batch_size)))
    twins = {
        "MoE": config,
        **{
            f"dense, {which} parameters": dataclasses.replace(
                config, model=dataclasses.replace(config.model, dense=which)
            )
            for which in ("active", "total")
        },
    }
    products = machine.matmuls("float32")
    seconds: dict[str, Times] = {}
    shares: dict[str, float] = {}
    for name, twin in twins.items():  # one at a time: three optimizer states would not fit beside one another
        trainer = Trainer.of(twin, batch_size)
        both = alternate({name: trainer, **{n: run for n, (run, _) in products.items()}}, max(3, rounds // 2))
        seconds[name] = both[name]
        rate = max(flops / both[n].median for n, (_, flops) in products.items())
        shares[name] = trainer.active_flops / both[name].median / rate
        del trainer
    tokens = batch_size * config.model.seq_len
    console.print(_times("training step", seconds, lambda _, t: f"{tokens / t.median:,.0f} tokens/s"))
    numbers = {
        "tokens_per_second": tokens / seconds["MoE"].median,
        "share_of_matmul_peak": shares["MoE"],
        "wall_over_dense_active": seconds["MoE"].median / seconds["dense, active parameters"].median,
        "dense_total_over_wall": seconds["dense, total parameters"].median / seconds["MoE"].median,
    }
    _numbers(console, numbers)
    return numbers


def _card_table(config: RunConfig, static: card.Card) -> Table:
    whole = totals(static.parameters)
    table = Table(title="static card", title_justify="left", title_style="bold")
    for name in ("parameters", "total", "active", "MiB"):
        table.add_column(name, justify="left" if name == "parameters" else "right")
    for name, count in {**static.parameters, "in all": whole}.items():
        table.add_row(name, f"{count.total:,}", f"{count.active:,}", f"{count.total * 4 / 2**20:,.1f}")
    table.add_section()
    table.add_row("training MFLOP a token", "by formula", "in the program", "off by")
    for group, flops in static.formula.items():
        compiled = static.compiled[group]
        table.add_row(group, f"{flops / 1e6:,.2f}", f"{compiled / 1e6:,.2f}", f"{compiled / flops - 1:+.2%}")
    table.add_row("all experts on every token", f"{static.all_experts:.2f} x", "", "")
    return table


def decode(console: Console, config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """Prefill and cached decoding, and the uncached forward of four tokens."""
    del batch_size
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
        3 * rounds,
    )
    bandwidth = read_bytes / times["memory read"].median
    bound = decoding.active_bytes(config) / bandwidth
    console.print(_times("decoding", times))
    numbers = {
        "decode_share_of_bandwidth_bound": bound / times["decode, batch 1"].median,
        **{f"decode_ms_per_token_batch{b}": times[f"decode, batch {b}"].median * 1e3 for b in (1, 8, 32)},
        "prefill_128_ms": times["prefill, 128 tokens"].median * 1e3,
        "uncached_4_token_ms": times["uncached forward, 4 tokens"].median * 1e3,
        "memory_bytes_per_second": bandwidth,
    }
    _numbers(console, numbers)
    return numbers


TARGETS = ("rtx3050-4gb", "quadro-t1000-4gb", "rtx3060-12gb")
"""Cards that `benchmark.py memory` plans for."""


def memory(console: Console, config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """The setting of the preset that fits each card; nothing runs. The preset's own batch is planned for."""
    del batch_size, rounds
    table = Table(title="first setting that fits, by XLA's buffer plan", title_justify="left", box=None, padding=(0, 1))
    for name in ("card", "precision", "optimizer", "remat", "batch", "MiB", "of", "fits"):
        table.add_column(name, justify="right" if name in ("batch", "MiB", "of") else "left", no_wrap=True)
    found: dict[str, Any] = {}
    for name in TARGETS:
        target = load_target(name)
        plan = gpu_plan.verdict(list(gpu_plan.search(config, target)), target).summary(target)
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


def against_peers(console: Console, config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """Ours beside transformers' Mixtral."""
    numbers, times = peers.compare(config, batch_size, rounds)
    console.print(_times("ours, and Mixtral in PyTorch by its two implementations of experts", times))
    for name, value in numbers.items():
        if name.endswith("_ratio"):
            said = "as fast as theirs: ours is SLOWER" if value < 1 else "as fast as theirs"
            console.print(f"{name.removesuffix('_ratio')}: {value:.2f} x {said}")
    console.print()
    return numbers


PARTS: dict[str, Callable[[Console, RunConfig, int, int], dict[str, Any]]] = {
    "moe": moe,
    "train": train,
    "decode": decode,
    "memory": memory,
    "peers": against_peers,
}
