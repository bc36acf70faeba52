"""The picture of `plan_pods.py --scaling`: memory, bytes sent, time and efficiency by number of devices."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.plots.figures import COLOURS, check_installed
from moe_jax.system.files import write_output

type Row = Mapping[str, Any]
"""A row of the table, as `plan_pods.py --scaling` prints it."""

SCHEMES = {
    "light": {"figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff", "text": "#1f2328", "grid": "#d1d9e0"},
    "dark": {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "text": "#e6edf3", "grid": "#3d444d"},
}
"""Colours of the picture, for a light and for a dark page."""


def save_scaling(rows: Sequence[Row], out: Path, name: str, title: str) -> list[str]:
    """Draw `NAME-light.svg` and `NAME-dark.svg`. Returns the paths.

    Raises UserError where matplotlib is missing.
    """
    check_installed()
    import matplotlib as mpl

    paths = []
    for scheme, colours in SCHEMES.items():
        text = colours["text"]
        style: dict[Any, Any] = {"text.color": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text}
        style |= {"axes.edgecolor": text, "grid.color": colours["grid"], "svg.hashsalt": "moe-jax"}
        style |= {key: value for key, value in colours.items() if "." in key}
        picture = io.BytesIO()
        with mpl.rc_context(style):
            scaling_figure(rows, title).savefig(picture, format="svg", metadata={"Date": None})
        write_output(out / f"{name}-{scheme}.svg", picture.getvalue())
        paths.append(str(out / f"{name}-{scheme}.svg"))
    return paths


def scaling_figure(rows: Sequence[Row], title: str) -> Any:
    """Three panels side by side. Rows whose program the compiler refused have no bytes and no time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    memory, sent, time = figure.subplots(1, 3)
    figure.suptitle(f"{title}: predicted from compiled programs, nothing measured", x=0.01, ha="left")
    places, names = range(len(rows)), [str(row["devices"]) for row in rows]
    for axes, label in ((memory, "memory of a device, GiB"), (sent, "sent by a device, MiB"), (time, "step, ms")):
        axes.set_title(label, loc="left", fontsize="medium")
        axes.set_xticks(places, names)
        axes.set_xlabel("devices")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.5)
        axes.set_axisbelow(True)
    _bars(
        memory,
        [[r["arguments_mib"] / 1024 for r in rows], [r["temporary_mib"] / 1024 for r in rows]],
        ["arguments", "temporary"],
        COLOURS[:2],
    )
    memory.axhline(rows[0]["memory_mib"] / 1024, color=COLOURS[7], linestyle="--", label="the device has")
    kinds = [k for k in ("all-to-all", "all-gather", "all-reduce") if any((r["sent_bytes"] or {}).get(k) for r in rows)]
    heights = [[(r["sent_bytes"] or {}).get(kind, 0) / 2**20 for r in rows] for kind in kinds]
    _bars(sent, heights, kinds, COLOURS[2:])
    parts = ("arithmetic", "collectives")
    _bars(time, [[r[f"{part}_ms"] or 0 for r in rows] for part in parts], list(parts), (COLOURS[0], COLOURS[4]))
    for place, row in zip(places, rows, strict=True):
        if row["efficiency"] is not None:
            time.annotate(f"{row['efficiency']:.0%}", (place, row["predicted_step_ms"]), ha="center", va="bottom")
    tops = (
        max(rows[0]["memory_mib"], *(row["total_mib"] for row in rows)) / 1024,
        max(sum(values) for values in zip(*heights, strict=True)) if heights else 1.0,
        max(row["predicted_step_ms"] or 0 for row in rows),
    )
    for axes, top in zip((memory, sent, time), tops, strict=True):
        axes.set_ylim(0, 1.3 * top or 1.0)  # room for the legend
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)
    return figure


def _bars(axes: Any, heights: Sequence[Sequence[float]], labels: Sequence[str], colours: Sequence[str]) -> None:
    """Bars on top of each other, one for each row of the table."""
    bottom = [0.0] * len(heights[0]) if heights else []
    for values, label, colour in zip(heights, labels, colours, strict=False):
        axes.bar(range(len(values)), values, bottom=bottom, label=label, color=colour, width=0.7)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
