"""`benchmark.py train`: the static card, and the training step beside its dense twins, by the clock, by arithmetic and,
where a comparison has trained them, by what they learn."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax.analysis.accounting import totals
from moe_jax.analysis.bench import card, machine
from moe_jax.analysis.bench.part import Ask, print_numbers, times_table
from moe_jax.analysis.bench.timing import Times, alternate
from moe_jax.analysis.bench.training import Trainer
from moe_jax.analysis.comparison import MODELS, twin
from moe_jax.analysis.plots import COLOURS
from moe_jax.config import Dense, RunConfig, UserError

LABELS: dict[Dense, str] = {"none": "MoE", "active": "dense, active parameters", "total": "dense, total parameters"}


def train(console: Console, ask: Ask) -> dict[str, Any]:
    """The static card, and the training step beside its dense twins."""
    static = card.compute(ask.config, ask.batch_size)
    console.print(_card_table(ask.config, static))
    seconds: dict[Dense, Times] = {}
    shares: dict[Dense, float] = {}
    products = machine.matmuls("float32")
    for dense in MODELS:  # one at a time: three optimizer states would not fit beside one another
        trainer = Trainer.of(twin(ask.config, dense), ask.batch_size)
        candidates = {"step": trainer, **{name: run for name, (run, _) in products.items()}}
        times = alternate(candidates, max(3, ask.rounds // 2))
        seconds[dense] = times["step"]
        rate = max(flops / times[name].median for name, (_, flops) in products.items())
        shares[dense] = trainer.active_flops / times["step"].median / rate
        del trainer
    tokens = ask.batch_size * ask.config.model.seq_len
    numbers = {
        "tokens_per_second": tokens / seconds["none"].median,
        "share_of_matmul_peak": shares["none"],
        "wall_over_dense_active": seconds["none"].median / seconds["active"].median,
        "dense_total_over_wall": seconds["total"].median / seconds["none"].median,
    }
    models: dict[Dense, dict[str, float]] = {dense: _model(ask, dense, seconds[dense]) for dense in MODELS}
    named = {LABELS[dense]: times for dense, times in seconds.items()}
    console.print(times_table("training step", named, lambda _, t: f"{tokens / t.median:,.0f} tokens/s"))
    console.print(_models_table(models))
    print_numbers(console, numbers)
    return numbers | {"models": {MODELS[dense]: found for dense, found in models.items()}}


def _model(ask: Ask, dense: Dense, times: Times) -> dict[str, float]:
    """What one model costs, and what it learned."""
    config = twin(ask.config, dense).model
    flops = sum(card.formula(config, ask.batch_size).values())
    found = {"ms_per_step": 1e3 * times.median, "mflops_per_token": flops / 1e6}
    return found | ({"bits_per_byte": ask.quality[dense]} if ask.quality else {})


_QUANTITIES = {
    "ms_per_step": "ms a training step",
    "mflops_per_token": "MFLOP a token",
    "bits_per_byte": "bits per byte",
}


def _models_table(models: dict[Dense, dict[str, float]]) -> Table:
    table = Table(title="MoE beside its dense twins", title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    quantities = [name for name in _QUANTITIES if name in models["none"]]
    for name in quantities:
        table.add_column(_QUANTITIES[name], justify="right")
    for dense, numbers in models.items():
        table.add_row(LABELS[dense], *(f"{numbers[name]:,.4g}" for name in quantities))
    return table


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


def read_quality(folder: Path, preset: str) -> dict[Dense, float]:
    """Mean validation bits per byte at the same tokens, from a folder of `python -m moe_jax compare`. Raises UserError
    where there is no finished comparison, or one of another preset."""
    path = folder / "comparison.json"
    remedy = f"`python -m moe_jax compare --preset {preset} --out FOLDER` makes one"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        arms = {arm["arm"]: arm["mean"] for arm in found["arms"]}
        names: dict[Dense, str] = {d: n if d == "none" else f"{n}, same tokens" for d, n in MODELS.items()}
        quality: dict[Dense, float] = {dense: float(arms[name]) for dense, name in names.items()}
        compared = found["preset"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--with-quality {folder}: no finished comparison there; {remedy}") from None
    if compared != preset:
        raise UserError(f"--with-quality {folder}: a comparison of {compared}, not of {preset}; {remedy}")
    return quality


def twins_figure(preset: str, models: dict[str, dict[str, float]]) -> Any:
    """Bars of the three models, one panel a quantity, in the order of `models`; a matplotlib figure."""
    from matplotlib.figure import Figure

    quantities = [name for name in _QUANTITIES if name in models["moe"]]
    figure = Figure(figsize=(3.2 * len(quantities), 3), layout="constrained")
    figure.suptitle(f"{preset}: the mixture beside its dense twins", x=0.01, ha="left", fontweight="bold")
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
