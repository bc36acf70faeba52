"""Pictures of one run, or of several compared, with matplotlib (extra `plots`): curves, and the load of the experts.

The figures are of the class `Figure`, without a window and without global state. So a notebook can show them inline,
and a program without a display can save them.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import UserError
from moe_jax.runs.records import read_metrics, read_summary
from moe_jax.system.files import write_output

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc6fa3", "#e69f00", "#56b4e9", "#7a4fa3", "#737373")
"""Colours that colour-blind readers can distinguish (after Okabe and Ito)."""
FORMATS = ("png", "svg")


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of the load float [..., E], divided by ln E and rounded to 4 decimals. 1: all experts have the same load;
    0: one expert has all."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1e-12)
    nats = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
    return np.asarray(np.round(nats / math.log(max(load.shape[-1], 2)), 4) + 0.0)  # no -0.0, which is shown as -0.000


def check_installed() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("matplotlib is not installed; `uv run --extra plots moe-jax plot` draws them") from None


def run_figures(folders: Sequence[Path]) -> dict[str, Any]:
    """Figures of one run, or of several compared, by name.

    The names are loss, bits_per_byte, learning_rate, throughput, balance, drops, evenness; and load for a single MoE
    run. A figure without data is left out. Raises UserError for a folder without metrics.
    """
    check_installed()
    runs = [_Metrics(folder) for folder in folders]
    figures = {
        "loss": _curves(runs, "loss", "nats per token", "Loss"),
        "bits_per_byte": _bits(runs),
        "learning_rate": _curves(runs, "lr", "learning rate", "Learning rate", splits=("train",)),
        "throughput": _curves(runs, "tokens_per_second", "tokens per second", "Throughput", splits=("train",), floor=0),
        "balance": _curves(runs, "balance_loss", "balance loss (1 is balanced)", "Balance", splits=("train",)),
        "drops": _curves(runs, "drop_fraction", "share of choices dropped", "Drops", splits=("train",), floor=0),
        "evenness": _evenness(runs),
    }
    if len(runs) == 1:
        figures["load"] = load_figure(runs[0].loads)
    return {name: figure for name, figure in figures.items() if figure is not None}


def save_figures(figures: dict[str, Any], out: Path) -> list[Path]:
    """Write every figure as PNG and SVG into a folder. Returns the paths."""
    import matplotlib as mpl

    paths = []
    with mpl.rc_context({"svg.hashsalt": "moe-jax"}):  # so that the same picture gives the same file
        for name, figure in figures.items():
            for kind in FORMATS:
                picture, metadata = io.BytesIO(), {"Date": None} if kind == "svg" else None
                figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
                paths.append(out / f"{name}.{kind}")
                write_output(paths[-1], picture.getvalue())
    return paths


class _Metrics:
    """The records of one run, its name and its summary."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self.records = read_metrics(folder)
        if not self.records["train"]:
            raise UserError(f"--run {folder}: no metrics.jsonl with training records there; name the folder of a run")
        self.summary = read_summary(folder)

    def series(self, split: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of the records that have the value."""
        points = [(r["step"], r[name]) for r in self.records[split] if r.get(name) is not None]
        return [p[0] for p in points], [p[1] for p in points]

    @property
    def loads(self) -> tuple[list[int], np.ndarray]:
        """Steps, and float [steps, L, E]; empty for a dense baseline."""
        records = [r for r in self.records["train"] if r.get("load")]
        return [r["step"] for r in records], np.array([r["load"] for r in records])


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _curves(
    runs: Sequence[_Metrics],
    name: str,
    label: str,
    title: str,
    splits: tuple[str, ...] = ("train", "val"),
    floor: float | None = None,
) -> Any:
    """A value by step: training as a solid line, validation as a dashed line with dots. Each run has its own colour."""
    figure, axes = _axes(_of(title, runs), "step", label)
    drawn = 0
    for i, run in enumerate(runs):
        for split in splits:
            steps, values = run.series(split, name)
            drawn += len(steps)
            named = (
                run.name
                if len(splits) == 1
                else f"{run.name}, {'training' if split == 'train' else 'validation subset'}"
            )
            style = {"marker": "o", "markersize": 4, "linestyle": "--"} if split == "val" else {"linewidth": 1.4}
            axes.plot(steps, values, color=COLOURS[i % len(COLOURS)], label=named, **style)
    axes.set_xlim(left=0)
    if floor is not None:
        axes.set_ylim(bottom=floor)
    if "share" in label:
        axes.yaxis.set_major_formatter("{x:.0%}")
    elif name == "tokens_per_second":
        axes.yaxis.set_major_formatter("{x:,.0f}")
    elif name == "balance_loss":
        axes.axhline(1, color="0.3", linestyle=":")
    if len(runs) > 1 or len(splits) > 1:
        axes.legend(frameon=False)
    return figure if drawn else None


def _of(title: str, runs: Sequence[_Metrics]) -> str:
    return f"{title}: {runs[0].name}" if len(runs) == 1 else title


def _bits(runs: Sequence[_Metrics]) -> Any:
    """Bits per byte of the fixed validation subset. Lines show the trigram score of the whole text, and its entropy,
    for each different value among the runs."""
    title = "Bits per byte of the validation subset"
    figure = _curves(runs, "bits_per_byte", "bits per byte", title, splits=("val",))
    lines = {
        "trigram_bits_per_byte": ("-.", "trigram model of the training text"),
        "entropy_floor_bits_per_byte": (":", "entropy of the whole validation text"),
    }
    for name, (style, label) in lines.items():
        for value in sorted({run.summary[name] for run in runs if run.summary.get(name) is not None}):
            if figure is not None:
                (axes,) = figure.axes
                axes.axhline(value, color="0.4", linestyle=style, label=f"{label}, {value:.4f}")
                axes.legend(frameon=False)
    scores = np.concatenate([run.series("val", "bits_per_byte")[1][1:] for run in runs])
    if figure is not None and len(scores) > 2:  # the first, of a model that knows nothing yet, would flatten the rest
        (axes,) = figure.axes
        shown = [*scores, *(line.get_ydata()[0] for line in axes.lines[len(runs) :])]
        axes.set_ylim(0.97 * min(shown), 1.03 * max(shown))
    return figure


def _evenness(runs: Sequence[_Metrics]) -> Any:
    """How evenly the experts are used, by step, as the mean over the layers. None if no run has experts."""
    figure, axes = _axes(_of("Evenness of the load", runs), "step", "entropy of the shares (1 is even)")
    routed = [(i, run) for i, run in enumerate(runs) if len(run.loads[1])]
    for i, run in routed:
        steps, values = run.loads
        axes.plot(steps, load_entropy(values).mean(1), color=COLOURS[i % len(COLOURS)], label=run.name, linewidth=1.4)
    axes.set_xlim(left=0)
    axes.set_ylim(top=1.002)
    if routed and len(runs) > 1:
        axes.legend(frameon=False)
    return figure if routed else None


def load_figure(loads: tuple[list[int], np.ndarray]) -> Any:
    """The load of the experts by step, one panel for each layer, with the evenness at the end. None without experts."""
    steps, values = loads
    if not len(values):
        return None
    from matplotlib.figure import Figure

    layers, experts = values.shape[1:]
    figure = Figure(figsize=(8, 1.2 + 1.5 * layers), layout="constrained")
    panels = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle("Load of the experts (share of the choices; white is the fair share)", x=0.01, ha="left")
    extent = (steps[0], max(steps[-1], steps[0] + 1), experts - 0.5, -0.5)
    look = {"aspect": "auto", "cmap": "PuOr", "vmin": 0, "vmax": 2, "interpolation": "nearest", "extent": extent}
    images = [axes.imshow(values[:, layer].T * experts, **look) for layer, axes in enumerate(panels)]
    for layer, axes in enumerate(panels):
        evenness = float(load_entropy(values[-1, layer]))
        axes.set_ylabel(f"layer {layer}")
        axes.set_title(f"evenness at the end {evenness:.3f}", loc="right", fontsize=8)
    panels[-1].set_xlabel("step")
    figure.colorbar(images[0], ax=panels.tolist(), label="times the fair share", shrink=0.8)
    return figure
