"""`benchmark.py train`: the cost table, and the training step compared with its dense baselines.

The cost table has parameters and arithmetic by group; the arithmetic by formula and as compiled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from moe_jax.certify.formulas import expert_flops, router_flops, step_products
from moe_jax.certify.hlo import read_program
from moe_jax.config import Dense, RunConfig
from moe_jax.model.costs import Count, count_parameters, totals
from moe_jax.system import machine
from moe_jax.system.environment import runs_on_cpu
from moe_jax.system.machine import Times, alternate
from moe_jax.training.programs import Programs

from .random_tokens import RandomTokenTrainer
from .request import BenchmarkRequest, matmul_rate_in, print_numbers, times_table

SCOPES = {"attention": "attention", "experts and router": "ffn", "head": "head"}
"""Group of the cost table -> the named scope of its operations in the program."""

DENSE_BASELINES: dict[Dense, str] = {"none": "moe", "active": "dense-active", "total": "dense-total"}
"""`ModelConfig.dense` -> the name in tables, pictures and folders. The mixture itself comes first."""
LABELS: dict[Dense, str] = {"none": "MoE", "active": "dense, active parameters", "total": "dense, total parameters"}


def dense_baseline(config: RunConfig, dense: Dense) -> RunConfig:
    """The same recipe with a dense network of the same active or total parameters; "none" is the mixture itself."""
    return config.override({("model", "dense"): dense})


class CostTable(NamedTuple):
    """The costs of a model that are known before anything runs."""

    parameters: dict[str, Count]
    formula: dict[str, float]
    """Training operations of one token by group, forward and backward. The experts' group counts every row that is
    multiplied, filled or not."""
    compiled: dict[str, float]
    """The same, read from the optimised program of a whole training step."""
    all_experts: float
    """Training operations of one token if every expert ran on it, divided by the training operations of this model."""

    @classmethod
    def of(cls, config: RunConfig, batch_size: int) -> "CostTable":
        """The table of the training step for `batch_size` sequences, which is compiled here."""
        program = read_program(Programs.of(config).compiled_step(batch_size).as_text())
        tokens = batch_size * config.model.seq_len
        formula = flops_by_group(config, batch_size)
        compiled = {group: program.flops_of(scope) / tokens for group, scope in SCOPES.items()}
        c, whole = config.model, sum(formula.values())
        every = 3 * c.layers * (expert_flops(c, c.experts + c.shared_experts) + router_flops(c, 1))
        all_experts = (whole - formula["experts and router"] + every) / whole if c.dense == "none" else 1.0
        return cls(count_parameters(c), formula, compiled, all_experts)


def flops_by_group(config: RunConfig, batch_size: int) -> dict[str, float]:
    """Operations of one token in a training step of `batch_size` sequences, by group, without the optimizer's."""
    products = step_products(config, batch_size)
    return {group: products[scope] / (batch_size * config.model.seq_len) for group, scope in SCOPES.items()}


def train(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """The cost table, and the training step beside its dense baselines."""
    static = CostTable.of(request.config, request.batch_size)
    console.print(_cost_table(static))
    # A CPU has other work too, and is faster in one minute than in the next. A card may not hold all models together.
    together = runs_on_cpu()
    groups: list[list[Dense]] = [list(DENSE_BASELINES)] if together else [[dense] for dense in DENSE_BASELINES]
    seconds, share = _step_times(request, groups)
    tokens = request.batch_size * request.config.model.seq_len
    numbers = {
        "tokens_per_second": tokens / seconds["none"].median,
        "share_of_matmul_peak": share,
        "wall_over_dense_active": seconds["none"].median / seconds["active"].median,
        "dense_total_over_wall": seconds["total"].median / seconds["none"].median,
    }
    mflops = {
        LABELS[dense]: sum(flops_by_group(dense_baseline(request.config, dense), request.batch_size).values()) / 1e6
        for dense in DENSE_BASELINES
    }
    console.print(
        times_table(
            f"training step, {'all models in turn' if together else 'one model after another'}",
            {LABELS[dense]: times for dense, times in seconds.items()},
            lambda name, t: f"{tokens / t.median:,.0f} tokens/s, {mflops[name]:,.4g} MFLOP a token",
        )
    )
    print_numbers(console, numbers)
    models = {
        name: {"ms_per_step": 1e3 * seconds[dense].median, "mflops_per_token": mflops[LABELS[dense]]}
        for dense, name in DENSE_BASELINES.items()
    }
    return numbers | {"models": models}


def _step_times(request: BenchmarkRequest, groups: list[list[Dense]]) -> tuple[dict[Dense, Times], float]:
    """The times of a step of each model, and the mixture's share of the rate of the fastest matmul.

    The models of a group run in turn, with the matmuls.
    """
    products = machine.matmuls("float32")
    seconds: dict[Dense, Times] = {}
    share = 0.0
    for group in groups:
        trainers: dict[Dense, RandomTokenTrainer] = {
            dense: RandomTokenTrainer.of(dense_baseline(request.config, dense), request.batch_size) for dense in group
        }
        steps: dict[str, Callable[[], Any]] = {LABELS[dense]: trainers[dense] for dense in group}
        times = alternate(steps | {name: run for name, (run, _) in products.items()}, max(3, request.rounds // 2))
        seconds |= {dense: times[LABELS[dense]] for dense in group}
        if "none" in trainers:
            rate = matmul_rate_in(times, products)
            share = trainers["none"].active_flops / seconds["none"].median / rate
        del trainers, steps
    return seconds, share


def _cost_table(static: CostTable) -> Table:
    whole = totals(static.parameters)
    table = Table(title="cost table", title_justify="left", title_style="bold")
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
