"""Pictures of a comparison: the final results of all seeds, and the curves during training (extra `plots`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.config import Dense
from moe_jax.config.baselines import DENSE_BASELINES
from moe_jax.experiments.comparison import Basis, Plan, runs
from moe_jax.experiments.comparison_result import ArmResult
from moe_jax.experiments.intervals import t_interval
from moe_jax.plots.figures import COLOURS, check_installed
from moe_jax.runs.metrics import read_metrics

PANELS: dict[Basis, str] = {"tokens": "same tokens", "wall": "same wall clock"}
_COLOUR: dict[Dense, str] = dict(zip(DENSE_BASELINES, COLOURS, strict=False))


def comparison_figures(plan: Plan, results: Sequence[ArmResult], out: Path) -> dict[str, Any]:
    """Two figures by name, each with one panel for the same tokens and one for the same wall clock.

    `comparison`: the final bits per byte, each seed as a dot, and the mean with its interval. A thin line joins the
    runs of one seed, and rises by their difference. `curves`: bits per byte of the fixed subset of the validation
    text during training. Raises UserError where matplotlib is missing.
    """
    check_installed()
    seeds = len(results[0].summaries)
    return {"comparison": _final_results(results), "curves": _training_curves(plan, seeds, out)}


def _panels(stream: str) -> tuple[Any, dict[Basis, Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS), sharey=True), strict=True))
    for basis, axes in panels.items():
        axes.set_title(PANELS[basis], loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels["tokens"].set_ylabel(f"bits per byte of the {stream}")
    return figure, panels


def _final_results(results: Sequence[ArmResult]) -> Any:
    figure, panels = _panels("whole validation stream")
    for basis, axes in panels.items():
        shown = [r for r in results if r.arm.dense == "none" or r.arm.basis == basis]
        for x, result in enumerate(shown):
            colour, interval = _COLOUR[result.arm.dense], t_interval(result.bits)
            half = interval.high - interval.mean if interval.known else 0
            axes.errorbar([x], [interval.mean], yerr=[half], fmt="D", color=colour, capsize=6, markersize=6)
            axes.plot([x + 0.15] * len(result.bits), result.bits, "o", color=colour, alpha=0.5, markersize=4)
        for runs_of_a_seed in zip(*(r.bits for r in shown), strict=True):
            axes.plot([x + 0.15 for x in range(len(shown))], runs_of_a_seed, color="0.7", linewidth=0.8, zorder=1)
        axes.set_xticks(range(len(shown)), [DENSE_BASELINES[r.arm.dense] for r in shown])
        axes.set_xlim(-0.5, len(shown) - 0.5)
    return figure


def _training_curves(plan: Plan, seeds: int, out: Path) -> Any:
    figure, panels = _panels("validation subset")
    for arm, seed, config in runs(plan, seeds, out):
        records = read_metrics(Path(config.run_dir))["val"]
        steps, bits = [r["step"] for r in records], [r["bits_per_byte"] for r in records]
        step: dict[Basis, float] = {
            "tokens": config.tokens_per_step / 1e6,
            "wall": plan.step_seconds[arm.dense],
        }
        shown: list[Basis] = list(PANELS) if arm.dense == "none" else [arm.basis]
        for basis in shown:
            label = DENSE_BASELINES[arm.dense] if seed == 0 else None
            axes = panels[basis]
            axes.plot([s * step[basis] for s in steps], bits, color=_COLOUR[arm.dense], alpha=0.8, label=label)
    panels["tokens"].set_xlabel("million training tokens")
    panels["wall"].set_xlabel("training seconds, by the measured step times")
    for axes in panels.values():
        axes.legend(frameon=False)
    return figure
