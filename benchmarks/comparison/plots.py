"""Pictures of comparisons (extra `plots`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from suites.dense_baselines import DENSE_BASELINES

from comparison.report import t_interval
from moe_jax.config import Dense
from moe_jax.plots import COLOURS, check_installed
from moe_jax.runs.records import read_metrics

if TYPE_CHECKING:
    from comparison.baselines import Basis, Groups, Plan
    from comparison.scaling import Scaling

PANELS: "dict[Basis, str]" = {"tokens": "same tokens", "wall": "same wall clock"}
_NAMES: dict[Dense, str] = {
    "none": "mixture of experts",
    "active": "dense,\nsame active parameters",
    "total": "dense,\nsame total parameters",
}
_COLOUR: dict[Dense, str] = dict(zip(DENSE_BASELINES, COLOURS, strict=False))


def comparison_figures(plan: "Plan", groups: "Groups", out: Path) -> dict[str, Any]:
    """Two figures by name, each with one panel for the same tokens and one for the same wall clock.

    `comparison`: the final bits per byte, each seed as a dot, and the mean with its interval. A thin line joins the
    runs of one seed, and rises by their difference. `curves`: bits per byte of the fixed subset of the validation
    text during training; runs of a tuned comparison have none, because they are scored once. Raises UserError where
    matplotlib is missing.
    """
    check_installed()
    seeds = len(groups["tokens"][0].summaries)
    figures = {"comparison": _final_results(groups)}
    return figures if plan.tuning else figures | {"curves": _training_curves(plan, seeds, out)}


def _panels(text: str) -> "tuple[Any, dict[Basis, Any]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS), sharey=True), strict=True))
    for basis, axes in panels.items():
        axes.set_title(PANELS[basis], loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels["tokens"].set_ylabel(f"bits per byte of {text}\n(lower is better)")
    return figure, panels


def _final_results(groups: "Groups") -> Any:
    figure, panels = _panels("the text that is scored")
    for basis, axes in panels.items():
        shown = groups[basis]
        for x, result in enumerate(shown):
            colour, interval = _COLOUR[result.arm.dense], t_interval(result.bits)
            half = interval.high - interval.mean if interval.known else 0
            axes.errorbar([x], [interval.mean], yerr=[half], fmt="D", color=colour, capsize=6, markersize=6)
            axes.plot([x + 0.15] * len(result.bits), result.bits, "o", color=colour, alpha=0.5, markersize=4)
        for runs_of_a_seed in zip(*(r.bits for r in shown), strict=True):
            axes.plot([x + 0.15 for x in range(len(shown))], runs_of_a_seed, color="0.7", linewidth=0.8, zorder=1)
        axes.set_xticks(range(len(shown)), [_NAMES[r.arm.dense] for r in shown])
        axes.set_xlim(-0.5, len(shown) - 0.5)
    return figure


def _training_curves(plan: "Plan", seeds: int, out: Path) -> Any:
    figure, panels = _panels("a part of the validation text")
    for arm, seed, config in plan.runs(seeds, out):
        records = read_metrics(Path(config.run_dir))["val"]
        steps, bits = [r["step"] for r in records], [r["bits_per_byte"] for r in records]
        step: dict[Basis, float] = {
            "tokens": config.tokens_per_step / 1e6,
            "wall": plan.step_seconds[arm.name],
        }
        shown: list[Basis] = list(PANELS) if arm.dense == "none" else [arm.basis]
        for basis in shown:
            label = _NAMES[arm.dense] if seed == 0 else None
            axes = panels[basis]
            axes.plot([s * step[basis] for s in steps], bits, color=_COLOUR[arm.dense], alpha=0.8, label=label)
    panels["tokens"].set_xlabel("million training tokens")
    panels["wall"].set_xlabel("training seconds, by the measured step times")
    for axes in panels.values():
        axes.legend(frameon=False)
    return figure


def scaling_figure(found: "Scaling") -> Any:
    """Both models at all budgets on logarithmic axes, with the fitted lines and the interval of each prediction.

    Dots are seeds and diamonds are means. Lines are solid over the budgets that were trained, and dashed beyond.
    """
    check_installed()
    figure, axes = _axes(f"{found.base.preset}: loss against training operations", "training operations")
    axes.set_xscale("log")
    axes.set_yscale("log")
    trained = found.budgets[-1].flops
    grid = np.geomspace(found.budgets[0].flops, max(found.predicted_flops, trained), 200)
    for side, colour in zip((found.mixture, found.baseline), COLOURS, strict=False):
        law = side.law
        label = f"{side.name}, b = {law.exponent:.4f} ± {law.exponent_error:.4f}"
        inside, beyond = grid[grid <= trained], grid[grid >= trained]
        axes.plot(inside, [law.loss(c) for c in inside], color=colour, linewidth=1.4)
        axes.plot(beyond, [law.loss(c) for c in beyond], color=colour, linewidth=1.4, linestyle="--")
        bounds = [law.prediction(c) for c in grid]
        axes.fill_between(grid, [b.low for b in bounds], [b.high for b in bounds], color=colour, alpha=0.12, lw=0)
        for flops, bits in zip(side.flops, side.bits, strict=True):
            axes.plot([flops] * len(bits), bits, "o", color=colour, alpha=0.4, markersize=4)
        axes.plot(side.flops, side.means, "D", color=colour, markersize=6, label=label)
    axes.set_xlim(right=3 * grid[-1])
    _write_predictions(axes, found)
    axes.axvline(trained, color="0.6", linestyle=":", linewidth=1)
    axes.text(trained, 0.985, "  predicted from here on", transform=axes.get_xaxis_transform(), fontsize=8, va="top")
    _plain_numbers(axes.yaxis)
    title = "loss = a C$^{-b}$, b with its standard error"
    axes.legend(frameon=False, title=title, alignment="left", loc="lower left")
    return figure


def _write_predictions(axes: Any, found: "Scaling") -> None:
    """The predicted losses behind the ends of the lines, the higher one above and the lower one below."""
    sides = sorted(
        zip((found.mixture, found.baseline), COLOURS, strict=False), key=lambda s: s[0].law.loss(found.predicted_flops)
    )
    for (side, colour), place in zip(sides, (-6, 6), strict=True):
        end = side.law.prediction(found.predicted_flops)
        axes.annotate(
            f"{end.mean:.3f}",
            (found.predicted_flops, end.mean),
            (6, place),
            textcoords="offset points",
            color=colour,
            va="center",
        )


def _axes(title: str, x: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel("bits per byte of the whole validation stream")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _plain_numbers(axis: Any) -> None:
    """Write 0.8 and not 8 x 10^-1 at the ticks of a logarithmic axis that spans less than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
