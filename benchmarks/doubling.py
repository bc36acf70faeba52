"""One size of the model doubled at a time: how fast do time, arithmetic and memory of a training step grow?

    uv run --extra plots python benchmarks/doubling.py --preset story-cpu

A quantity that grows as size^a has the exponent a: the slope of the line through log(quantity) against log(size), by
least squares. 0 is no growth, 1 is twice as much for twice the size. Each measured exponent stands beside a predicted
one: time beside the step's arithmetic, and memory beside the least bytes that a step holds.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_jax.cli.main import main
from moe_jax.config import RunConfig
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model.costs import least_step_bytes, step_products
from moe_jax.planning.device_memory import Memory
from moe_jax.plots.figures import COLOURS
from moe_jax.system.environment import MIB
from moe_jax.system.files import json_text
from moe_jax.system.machine import alternate
from moe_jax.training.programs import Programs, RandomTokenTrainer

POINTS = 3
"""Sizes of an axis: the preset's own, twice, four times."""


class Axis(NamedTuple):
    """A size that is doubled."""

    letter: str
    meaning: str
    size: Callable[[RunConfig], int]
    grown: Callable[[RunConfig, int], RunConfig]
    """The configuration with the size multiplied by a factor."""


def _model(name: str) -> Callable[[RunConfig, int], RunConfig]:
    def grown(config: RunConfig, factor: int) -> RunConfig:
        value = getattr(config.model, name) * factor
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **{name: value}))

    return grown


def _batch(config: RunConfig, factor: int) -> RunConfig:
    train = dataclasses.replace(config.train, batch_size=config.train.batch_size * factor)
    return dataclasses.replace(config, train=train)


def _length(config: RunConfig, factor: int) -> RunConfig:
    """Longer sequences, and fewer of them: the tokens of a step stay."""
    longer = _model("seq_len")(config, factor)
    train = dataclasses.replace(longer.train, batch_size=longer.train.batch_size // factor)
    return dataclasses.replace(longer, train=train)


def _choices(config: RunConfig, factor: int) -> RunConfig:
    return dataclasses.replace(config, model=config.model.with_routing(top_k=config.model.routing.top_k * factor))


AXES = (
    Axis("T", "positions, as many tokens", lambda c: c.model.seq_len, _length),
    Axis("E", "experts", lambda c: c.model.experts, _model("experts")),
    Axis("K", "experts of a token", lambda c: c.model.routing.top_k, _choices),
    Axis("D", "width", lambda c: c.model.width, _model("width")),
    Axis("L", "layers", lambda c: c.model.layers, _model("layers")),
    Axis("B", "sequences of a step", lambda c: c.train.batch_size, _batch),
    Axis("V", "vocabulary", lambda c: c.model.vocab_size, _model("vocab_size")),
)


class Point(NamedTuple):
    """A step at one size."""

    size: int
    seconds: float
    flops: float
    """Arithmetic of the step by formula (`costs.step_products`)."""
    memory: int
    """Bytes of arguments, results and temporary arrays of the compiled step."""
    least_memory: int


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(value) against log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def points(base: RunConfig, axis: Axis, rounds: int) -> list[Point]:
    """The steps of an axis, timed in turn. Sizes that the configuration cannot have are left out."""
    configs = []
    for n in range(POINTS):
        factor = 2**n
        if axis.letter == "T" and base.train.batch_size % factor:
            break
        if axis.letter == "K" and base.model.routing.top_k * factor > base.model.experts:
            break
        configs.append(axis.grown(base, factor))
    trainers = {str(axis.size(c)): RandomTokenTrainer.of(c, c.train.batch_size) for c in configs}
    times = alternate(trainers, rounds)
    del trainers
    return [
        Point(
            axis.size(c),
            times[str(axis.size(c))].median,
            sum(step_products(c, c.train.batch_size).values()),
            round(MIB * Memory.of(Programs.of(c).compiled_step(c.train.batch_size)).total),
            least_step_bytes(c),
        )
        for c in configs
    ]


def growth(found: list[Point]) -> dict[str, float]:
    """The exponents of an axis: time and memory, each beside that of its formula."""
    sizes = [p.size for p in found]
    return {
        "time": exponent(sizes, [p.seconds for p in found]),
        "time_bound": exponent(sizes, [p.flops for p in found]),
        "memory": exponent(sizes, [p.memory for p in found]),
        "memory_bound": exponent(sizes, [p.least_memory for p in found]),
    }


def every_axis(console: Console, config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """Every axis, a table of exponents, and the points behind them."""
    train = dataclasses.replace(config.train, batch_size=batch_size, grad_accum=1)
    base = dataclasses.replace(config, train=train)
    table = Table(title="exponents: 0 is no growth, 1 is twice for twice", title_justify="left", title_style="bold")
    for name in ("twice as many", "sizes", "time", "arithmetic", "memory", "at least"):
        table.add_column(name, justify="left" if name in ("twice as many", "sizes") else "right")
    numbers: dict[str, Any] = {}
    for axis in AXES:
        found = points(base, axis, rounds)
        if len(found) < 2:
            console.print(f"left out: {axis.letter}, {axis.meaning}: the preset has no larger size")
            continue
        slopes = growth(found)
        numbers[axis.letter] = {**slopes, "points": [p._asdict() for p in found]}
        sizes = ", ".join(str(p.size) for p in found)
        cells = (f"{round(value, 2) + 0.0:.2f}" for value in slopes.values())
        table.add_row(f"{axis.letter}: {axis.meaning}", sizes, *cells)
    console.print(table)
    return numbers


def scaling_figure(preset: str, numbers: dict[str, Any]) -> Any:
    """A matplotlib figure: the time of a step over that of the smallest, against each size, beside its arithmetic. All
    axes are logarithmic, and all panels have one height."""
    from matplotlib.figure import Figure

    meanings = {axis.letter: axis.meaning for axis in AXES}
    columns = 4
    rows = -(-len(numbers) // columns)
    figure = Figure(figsize=(3 * columns, 2.7 * rows), layout="constrained")
    figure.suptitle(f"{preset}: a training step, one size doubled at a time", x=0.01, ha="left", fontweight="bold")
    grown = [
        p[name] / f["points"][0][name] for f in numbers.values() for p in f["points"] for name in ("seconds", "flops")
    ]
    most = max(grown)
    ticks = [2**n for n in range(math.ceil(math.log2(1.3 * most)))]
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (letter, found) in zip(panels, numbers.items(), strict=False):
        sizes = [p["size"] for p in found["points"]]
        seconds = np.array([p["seconds"] for p in found["points"]])
        flops = np.array([p["flops"] for p in found["points"]])
        axes.loglog(sizes, seconds / seconds[0], "o-", color=COLOURS[0], label=f"time, exponent {found['time']:.2f}")
        label = f"arithmetic, {found['time_bound']:.2f}"
        axes.loglog(sizes, flops / flops[0], "--", color=COLOURS[1], label=label)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0.8, 1.3 * most)
        axes.set_title(f"{letter}: {meanings[letter]}", loc="left", fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(numbers) :]:
        axes.set_axis_off()
    return figure


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", default="seed-158m", choices=list(PRESETS), help="the model")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--rounds", type=int, default=9, help="how often each size runs")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    asked = parser.parse_args(argv)
    config = with_vocabulary(preset(asked.preset))
    numbers = every_axis(Console(), config, asked.batch_size, asked.rounds)
    if asked.picture:
        scaling_figure(asked.preset, numbers).savefig(asked.picture, dpi=150)
    print(json_text(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
