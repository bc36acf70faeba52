"""`benchmark.py train`: the cost table, and the training step compared with its dense baselines.

They are compared by time, by arithmetic, and by validation bits per byte if a comparison has trained them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax.benchmarks import cost_table
from moe_jax.benchmarks.request import BenchmarkRequest, matmul_rate_in, print_numbers, times_table
from moe_jax.config import Dense, RunConfig, UserError
from moe_jax.config.baselines import DENSE_BASELINES, dense_baseline
from moe_jax.model.costs import totals
from moe_jax.model.step_memory import least_step_bytes
from moe_jax.plots.figures import COLOURS
from moe_jax.system import machine
from moe_jax.system.environment import machine_memory, runs_on_cpu
from moe_jax.system.machine import Times, alternate
from moe_jax.training.random_tokens import RandomTokenTrainer

LABELS: dict[Dense, str] = {"none": "MoE", "active": "dense, active parameters", "total": "dense, total parameters"}


def train(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """The cost table, and the training step beside its dense baselines."""
    static = cost_table.compute(request.config, request.batch_size, request.moe)
    console.print(_cost_table(static))
    groups = _groups(request.config)
    seconds, share = _step_times(request, groups)
    tokens = request.batch_size * request.config.model.seq_len
    numbers = {
        "tokens_per_second": tokens / seconds["none"].median,
        "share_of_matmul_peak": share,
        "wall_over_dense_active": seconds["none"].median / seconds["active"].median,
        "dense_total_over_wall": seconds["total"].median / seconds["none"].median,
    }
    models: dict[Dense, dict[str, float]] = {dense: _model(request, dense, seconds[dense]) for dense in DENSE_BASELINES}
    named = {LABELS[dense]: times for dense, times in seconds.items()}
    title = f"training step, {'all models in turn' if len(groups) == 1 else 'one model after another'}"
    console.print(times_table(title, named, lambda _, t: f"{tokens / t.median:,.0f} tokens/s"))
    console.print(_models_table(models))
    print_numbers(console, numbers)
    return numbers | {"models": {DENSE_BASELINES[dense]: found for dense, found in models.items()}}


def _step_times(request: BenchmarkRequest, groups: list[list[Dense]]) -> tuple[dict[Dense, Times], float]:
    """The times of a step of each model, and the mixture's share of the rate of the fastest matmul.

    The models of a group run in turn, with the matmuls.
    """
    products = machine.matmuls("float32")
    seconds: dict[Dense, Times] = {}
    share = 0.0
    for group in groups:
        trainers: dict[Dense, RandomTokenTrainer] = {
            dense: RandomTokenTrainer.of(dense_baseline(request.config, dense), request.batch_size, moe=request.moe)
            for dense in group
        }
        steps: dict[str, Callable[[], Any]] = {LABELS[dense]: trainers[dense] for dense in group}
        times = alternate(steps | {name: run for name, (run, _) in products.items()}, max(3, request.rounds // 2))
        seconds |= {dense: times[LABELS[dense]] for dense in group}
        if "none" in trainers:
            rate = matmul_rate_in(times, products)
            share = trainers["none"].active_flops / seconds["none"].median / rate
        del trainers, steps
    return seconds, share


def _groups(config: RunConfig) -> list[list[Dense]]:
    """All models in one group on a CPU: it has other work too, and is faster in one minute than in the next.

    On a card, or where memory may not hold all models together, each is a group of its own.
    """
    memory = machine_memory()
    least = sum(least_step_bytes(dense_baseline(config, dense)) for dense in DENSE_BASELINES)
    together = runs_on_cpu() and (memory is None or least <= memory / 2)
    return [list(DENSE_BASELINES)] if together else [[dense] for dense in DENSE_BASELINES]


def _model(request: BenchmarkRequest, dense: Dense, times: Times) -> dict[str, float]:
    """The costs of one model, and its validation bits per byte if they are known."""
    config = dense_baseline(request.config, dense).model
    flops = sum(cost_table.formula(config, request.batch_size).values())
    found = {"ms_per_step": 1e3 * times.median, "mflops_per_token": flops / 1e6}
    return found | ({"bits_per_byte": request.quality[dense]} if request.quality else {})


_QUANTITIES = {
    "ms_per_step": "ms a training step",
    "mflops_per_token": "MFLOP a token",
    "bits_per_byte": "bits per byte",
}


def _models_table(models: dict[Dense, dict[str, float]]) -> Table:
    table = Table(title="MoE beside its dense baselines", title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    quantities = [name for name in _QUANTITIES if name in models["none"]]
    for name in quantities:
        table.add_column(_QUANTITIES[name], justify="right")
    for dense, numbers in models.items():
        table.add_row(LABELS[dense], *(f"{numbers[name]:,.4g}" for name in quantities))
    return table


def _cost_table(static: cost_table.CostTable) -> Table:
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


def read_quality(folder: Path, preset: str) -> dict[Dense, float]:
    """Mean validation bits per byte at the same tokens, from a folder of `benchmarks/compare.py`.

    Raises UserError if the folder has no finished comparison, or one of another preset.
    """
    path = folder / "comparison.json"
    remedy = f"`uv run python benchmarks/compare.py --preset {preset} --out FOLDER` makes one"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        arms = {arm["arm"]: arm["mean"] for arm in found["arms"]}
        names: dict[Dense, str] = {d: n if d == "none" else f"{n}, same tokens" for d, n in DENSE_BASELINES.items()}
        quality: dict[Dense, float] = {dense: float(arms[name]) for dense, name in names.items()}
        compared = found["preset"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--with-quality {folder}: no finished comparison there; {remedy}") from None
    if compared != preset:
        raise UserError(f"--with-quality {folder}: a comparison of {compared}, not of {preset}; {remedy}")
    return quality


def baselines_figure(preset: str, models: dict[str, dict[str, float]]) -> Any:
    """A matplotlib figure with one panel for each quantity and one bar for each model, in the order of `models`."""
    from matplotlib.figure import Figure

    quantities = [name for name in _QUANTITIES if name in models["moe"]]
    figure = Figure(figsize=(3.2 * len(quantities), 3), layout="constrained")
    figure.suptitle(f"{preset}: the mixture beside its dense baselines", x=0.01, ha="left", fontweight="bold")
    for axes, name in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        values = [numbers[name] for numbers in models.values()]
        bars = axes.barh(range(len(models)), values, color=COLOURS[: len(models)])
        axes.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3)
        axes.set_yticks(range(len(models)), list(models) if name == quantities[0] else [""] * len(models))
        axes.set_xlim(0, 1.25 * max(values))
        axes.set_title(_QUANTITIES[name], loc="left", fontsize=10)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure
