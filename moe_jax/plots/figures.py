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
from moe_jax.runs.records import load_entropy, read_metrics, read_summary
from moe_jax.system.files import write_output

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc6fa3", "#e69f00", "#56b4e9", "#7a4fa3", "#737373")
"""Colours that colour-blind readers can distinguish (after Okabe and Ito)."""
FORMATS = ("png", "svg")
OVERVIEW_COLUMNS = 2


def check_installed() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plots: matplotlib is missing; add `--extra plots` after `uv run`") from None


def run_figures(folders: Sequence[Path]) -> dict[str, Any]:
    """Figures of one run, or of several compared, by name.

    The names are loss, bits_per_byte, learning_rate, throughput, balance, drops, evenness; and load for a single MoE
    run. A figure without data is left out. Raises UserError for a folder without metrics.
    """
    check_installed()
    runs = [_Metrics(folder) for folder in folders]
    figures = {
        "loss": _with_floor(_curves(runs, "loss", "nats per token", "Loss"), runs, "nats per token"),
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
    """Write every figure as PNG and SVG into a folder; of several, overview.png with all of them too.

    Returns the paths, the overview first.
    """
    import matplotlib as mpl

    paths = []
    if len(figures) > 1:
        paths.append(out / "overview.png")
        write_output(paths[-1], _overview(list(figures.values())))
    with mpl.rc_context({"svg.hashsalt": "moe-jax"}):  # so that the same picture gives the same file
        for name, figure in figures.items():
            for kind in FORMATS:
                picture, metadata = io.BytesIO(), {"Date": None} if kind == "svg" else None
                figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
                paths.append(out / f"{name}.{kind}")
                write_output(paths[-1], picture.getvalue())
    return paths


def _overview(figures: Sequence[Any]) -> bytes:
    """All figures on one page, side by side in pairs, as a PNG. A figure keeps its proportions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = []
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()))
    rows = [pictures[i : i + OVERVIEW_COLUMNS] for i in range(0, len(pictures), OVERVIEW_COLUMNS)]
    heights = [max(picture.shape[0] / picture.shape[1] for picture in row) for row in rows]
    width = OVERVIEW_COLUMNS * 7
    page = Figure(figsize=(width, sum(heights) * 7))
    top = 1.0
    for row, height in zip(rows, heights, strict=True):
        share = height / sum(heights)
        for column, picture in enumerate(row):
            place = (column / OVERVIEW_COLUMNS, top - share, 1 / OVERVIEW_COLUMNS, share)
            axes = page.add_axes(place)
            axes.imshow(picture, interpolation="lanczos")
            axes.set_anchor("NW")
            axes.axis("off")
        top -= share
    saved = io.BytesIO()
    page.savefig(saved, format="png", dpi=100)
    return saved.getvalue()


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

    def floor(self, unit: str) -> float | None:
        """The entropy of the validation text in `unit` (bits per byte or nats per token); None if it is unknown."""
        bits, size = (self.summary.get(k) for k in ("entropy_floor_bits_per_byte", "val_bytes_per_token"))
        if unit == "bits per byte" or bits is None or size is None:
            return bits if unit == "bits per byte" else None
        return bits * math.log(2) * size

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


def _with_floor(figure: Any, runs: Sequence[_Metrics], unit: str) -> Any:
    """Draw a horizontal line at the entropy of the validation text, for each different value among the runs."""
    floors = {floor for run in runs if (floor := run.floor(unit)) is not None}
    if figure is not None and floors:
        (axes,) = figure.axes
        for floor in sorted(floors):
            axes.axhline(floor, color="0.3", linestyle=":", label=f"entropy of the whole validation text, {floor:.4f}")
        axes.legend(frameon=False)
    return figure


def _bits(runs: Sequence[_Metrics]) -> Any:
    """Bits per byte of the fixed validation subset. Lines show the trigram score of the whole text, and its entropy,
    if they are known."""
    title = "Bits per byte of the validation subset"
    figure = _curves(runs, "bits_per_byte", "bits per byte", title, splits=("val",), floor=0)
    scores = {score for run in runs if (score := run.summary.get("trigram_bits_per_byte")) is not None}
    if figure is not None and scores:
        (axes,) = figure.axes
        for score in sorted(scores):
            axes.axhline(score, color="0.6", linestyle="-.", label=f"trigram model of the training text, {score:.4f}")
        axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], *scores))
        axes.legend(frameon=False)
    return _with_floor(figure, runs, "bits per byte")


def _evenness(runs: Sequence[_Metrics]) -> Any:
    """How evenly the experts are used, by step, as the mean over the layers. None if no run has experts."""
    figure, axes = _axes(_of("Evenness of the load", runs), "step", "entropy of the shares (1 is even)")
    routed = [(i, run) for i, run in enumerate(runs) if len(run.loads[1])]
    for i, run in routed:
        steps, values = run.loads
        axes.plot(steps, load_entropy(values).mean(1), color=COLOURS[i % len(COLOURS)], label=run.name, linewidth=1.4)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
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
