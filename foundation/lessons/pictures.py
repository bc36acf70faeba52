"""The pictures of the notebooks, so that their cells show mathematics."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

COLOURS = ("#1f5fa8", "#c8553d", "#3f7d4e", "#8a5aa8", "#b07d2b", "#51607a")
Curve = ArrayLike | tuple[ArrayLike, ArrayLike]
plt.rcParams |= {"figure.constrained_layout.use": True, "legend.framealpha": 0.85, "legend.edgecolor": "none"}


def heatmaps(
    panels: Mapping[str, ArrayLike],
    xlabel: str = "",
    ylabel: str = "",
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    numbers: str = ".2f",
    diverging: bool = True,
    bold: Mapping[str, ArrayLike] | None = None,
    height: float = 3.6,
) -> None:
    """Matrices side by side on one scale of colours, with their numbers; exact zeros are written as 0.

    `numbers` is a format, or empty for none. `bold` marks entries of a panel.
    """
    arrays = {title: np.asarray(matrix) for title, matrix in panels.items()}
    bound = max(float(np.max(np.abs(a))) for a in arrays.values()) or 1.0
    figure, axes = plt.subplots(1, len(arrays), figsize=(min(11.0, 3.6 * len(arrays) + 1), height), squeeze=False)
    for ax, (title, matrix) in zip(axes[0], arrays.items(), strict=True):
        low, cmap = (-bound, "RdBu_r") if diverging else (0.0, "Blues")
        ax.imshow(matrix, cmap=cmap, vmin=low, vmax=bound, aspect="auto")
        ax.set(title=title, xlabel=xlabel)
        few = 1 if columns else 1 + matrix.shape[1] // 12
        ax.set_xticks(range(0, matrix.shape[1], few), columns)
        ax.set_yticks(range(matrix.shape[0]), rows)
        if numbers:
            _write_numbers(ax, matrix, numbers, bound, None if bold is None else np.asarray(bold[title]))
    axes[0][0].set_ylabel(ylabel)
    figure.colorbar(axes[0][0].images[0], ax=axes[0].tolist(), shrink=0.85)
    plt.show()


def _write_numbers(ax: Any, matrix: np.ndarray, form: str, bound: float, bold: np.ndarray | None) -> None:
    for (i, j), value in np.ndenumerate(matrix):
        weight = "bold" if bold is not None and bold[i, j] else "normal"
        colour = "white" if abs(value) > 0.6 * bound else "#223"
        text = f"{value:{form}}" if value else "0"
        ax.text(j, i, text, ha="center", va="center", fontsize=8.5, color=colour, fontweight=weight)


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str = "",
    ylabel: str = "",
    log: bool | Sequence[bool] = False,
    markers: bool = False,
    level: float | None = None,
    log_x: int = 0,
) -> None:
    """Panels side by side. A curve is its heights, or (places, heights). `level` is drawn dashed, `log_x` is a base."""
    _, axes = plt.subplots(1, len(panels), figsize=(min(11.0, 5.6 * len(panels) + 1), 3.9), squeeze=False)
    logs = [log] * len(panels) if isinstance(log, bool) else list(log)
    for ax, (title, lines), is_log in zip(axes[0], panels.items(), logs, strict=True):
        for colour, (label, curve) in zip(COLOURS * 3, lines.items(), strict=False):
            x, y = curve if isinstance(curve, tuple) else (np.arange(len(np.asarray(curve))), curve)
            ax.plot(x, y, "o-" if markers else "-", ms=4, color=colour, label=label)
        if is_log:
            ax.set_yscale("log")
        if log_x:
            ax.set_xscale("log", base=log_x)
        if level is not None:
            ax.axhline(level, color="grey", ls="--", lw=1)
        ax.set(title=title, xlabel=xlabel)
        ax.grid(alpha=0.25)
        if any(lines):
            ax.legend(fontsize=9)
        if not log_x:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel(ylabel)
    plt.show()


def graph(order: Sequence[Any], width: float = 11.0, height: float = 5.0) -> None:
    """The graph of chapter 1, operands first, with the numbers of both passes: a box holds name or operation, value and
    gradient, an arrow its local derivative."""
    places = _places(order)
    xs, ys = zip(*places.values(), strict=True)
    _, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.9, max(ys) + 0.7))
    ax.axis("off")
    for value in order:
        for parent, local in value.edges:
            _arrow(ax, places[parent], places[value], f"{local:.3g}")
    for value in order:
        label = value.name or value.operation or f"{value.data:g}"
        box = {"boxstyle": "round,pad=0.45", "edgecolor": "#51607a"}
        box["facecolor"] = "#fff4e0" if value.edges else "#e8f0fe"
        text = f"{label}\nvalue {value.data:.3g}\ngrad {value.grad:.3g}"
        ax.text(*places[value], text, fontsize=8.5, ha="center", va="center", bbox=box)
    plt.show()


def _places(order: Sequence[Any]) -> dict[Any, tuple[float, float]]:
    """(column, row) of each value. Its column is its longest distance from an input; a column is ordered by the mean
    row of the operands, so that few arrows cross."""
    columns: dict[Any, int] = {}
    for value in order:
        columns[value] = 1 + max((columns[parent] for parent, _ in value.edges), default=-1)
    places: dict[Any, tuple[float, float]] = {}
    for column in range(max(columns.values()) + 1):
        values = [value for value in order if columns[value] == column]
        if column > 0:
            values.sort(key=lambda v: sum(places[p][1] for p, _ in v.edges) / len(v.edges))
        places |= {value: (float(column), row - (len(values) - 1) / 2) for row, value in enumerate(values)}
    return places


def _arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], label: str) -> None:
    """An arrow with a label at its middle; one that passes columns bends away from the boxes there."""
    bend = (0.35 if start[1] <= end[1] else -0.35) if end[0] - start[0] > 1.0 else 0.0
    style = {"arrowstyle": "-|>", "color": "#7a869a", "lw": 1.3, "shrinkA": 30, "shrinkB": 36}
    ax.annotate("", xy=end, xytext=start, arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})
    # matplotlib bends on the screen, so the middle of the arc is found there.
    (x0, y0), (x1, y1) = ax.transData.transform([start, end])
    middle = ((x0 + x1 + bend * (y1 - y0)) / 2, (y0 + y1 - bend * (x1 - x0)) / 2)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    x, y = ax.transData.inverted().transform(middle)
    ax.text(x, y, label, fontsize=8, color="#4a5568", ha="center", va="center", bbox=behind)


def plane(values: ArrayLike, points: Sequence[tuple[float, float, float]], title: str) -> None:
    """A net's output over a square, and the points that it learned: (x, y, target)."""
    figure, ax = plt.subplots(figsize=(5.4, 4.2))
    image = ax.imshow(np.asarray(values), extent=(-0.5, 1.5, -0.5, 1.5), cmap="RdBu_r", vmin=0, vmax=1)
    for x, y, target in points:
        ax.plot(x, y, "o", ms=11, mfc=COLOURS[1] if target else COLOURS[0], mec="white", mew=1.8)
    ax.set(xlabel="first input", ylabel="second input", title=title, xticks=(0, 1), yticks=(0, 1))
    figure.colorbar(image, ax=ax, label="output")
    plt.show()


def points(places: ArrayLike, labels: Sequence[str], red: ArrayLike, line: float, xlabel: str, ylabel: str) -> None:
    """Labelled points of two colours, and a dashed line at one place of the x axis."""
    _, ax = plt.subplots(figsize=(5.2, 4))
    for (x, y), label, is_red in zip(np.asarray(places), labels, np.asarray(red), strict=True):
        ax.plot(x, y, "o", ms=12, color=COLOURS[1] if is_red else COLOURS[0])
        ax.annotate(label, (x, y), textcoords="offset points", xytext=(8, 6))
    ax.axvline(line, color="grey", ls="--")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.margins(0.3)
    plt.show()


def triangles(
    columns: Mapping[str, tuple[ArrayLike, ArrayLike]], rows: tuple[tuple[str, str], tuple[str, str]]
) -> None:
    """Two squares for each column: which output (across) moves in which experiment (down).

    `rows` holds (title, label) of the upper and the lower squares. Blue is allowed: the output comes at the changed
    place or after it. Red is a leak. In the lower squares, the outputs that were cut away are grey.
    """
    _, axes = plt.subplots(2, len(columns), figsize=(11, 4.9), squeeze=False)
    white_blue_red_grey = ListedColormap(["white", "#9ec4ed", "#c7543d", "#e0e0e0"])
    for column, (name, pair) in enumerate(columns.items()):
        for row, moved in enumerate(map(np.asarray, pair)):
            ax, size = axes[row, column], len(moved)
            down, across = np.indices(moved.shape)
            earlier = across < down + row
            colours = np.where(earlier, 2 * moved, 3 if row == 1 else moved)
            ax.pcolormesh(colours, cmap=white_blue_red_grey, vmin=0, vmax=3, edgecolors="#999", lw=0.6)
            ax.set_xticks(np.arange(size) + 0.5, range(size))
            ax.set_yticks(np.arange(size) + 0.5, range(row, size + row))
            ax.tick_params(length=0)
            ax.invert_yaxis()
            title, label = rows[row]
            ax.set_title(f"{name}: {title}", fontsize=9)
            ax.set(aspect="equal", xlabel="output" if row == 1 else "", ylabel="" if column else label)
    plt.show()


def stacked(panels: Mapping[str, Mapping[str, ArrayLike]], outline: Mapping[str, ArrayLike], xlabel: str) -> None:
    """For each panel bars that stand on each other, and over them the panel's outline as a line of steps."""
    _, axes = plt.subplots(1, len(panels), figsize=(11, 3.9), sharey=True, squeeze=False)
    for ax, (title, parts) in zip(axes[0], panels.items(), strict=True):
        line = np.asarray(outline[title])
        bottom, edges = np.zeros(len(line)), np.arange(len(line) + 1) - 0.5
        for colour, (name, heights) in zip(COLOURS, parts.items(), strict=False):
            ax.bar(range(len(bottom)), np.asarray(heights), 0.7, bottom=bottom, color=colour, alpha=0.75, label=name)
            bottom = bottom + np.asarray(heights)
        ax.stairs(line, edges, baseline=None, color="#223", lw=1.4, label="draft, q")
        ax.set(title=title, xlabel=xlabel, xticks=range(len(line)))
        ax.legend(fontsize=9)
    axes[0][0].set_ylabel("probability")
    plt.show()
