"""Figures of one traced text, with matplotlib (extra `plots`)."""

import math
from typing import Any

import numpy as np

from moe_jax.plots.figures import COLOURS, check_installed


def trace_figures(
    load: np.ndarray, drop_fraction: np.ndarray, slots: int | None, first_choice: np.ndarray
) -> dict[str, Any]:
    """Two figures by name: `load`, how often each expert was chosen; `tokens`, the first choice of each token.

    load int [L, E], drop_fraction float [L], first_choice int [L, N]. `slots` are the slots of one expert, None without
    a capacity. Raises UserError where matplotlib is missing.
    """
    check_installed()
    return {"load": _load(load, drop_fraction, slots), "tokens": _tokens(first_choice, load.shape[1])}


def _load(load: np.ndarray, drop_fraction: np.ndarray, slots: int | None) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, experts = load.shape
    columns = min(layers, 3)
    figure = Figure(figsize=(3.4 * columns, 2.6 * math.ceil(layers / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(layers / columns), columns, squeeze=False, sharey=True).reshape(-1)
    for layer, axes in enumerate(panels):
        if layer >= layers:
            axes.set_visible(False)
            continue
        axes.bar(range(experts), load[layer], color=COLOURS[0])
        if slots is not None:
            axes.axhline(slots, color="0.2", linestyle="--")
        axes.set_title(f"layer {layer}: {drop_fraction[layer]:.1%} dropped", loc="left", fontsize=10)
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("choices" if slots is None else "choices (dashed: slots)")
    return figure


def _tokens(first_choice: np.ndarray, experts: int) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 1.2 + 0.35 * len(first_choice)), layout="constrained")
    axes = figure.subplots()
    look = {"cmap": colormaps["tab20"].resampled(experts), "vmin": -0.5, "vmax": experts - 0.5}
    image = axes.imshow(first_choice, aspect="auto", interpolation="nearest", **look)
    figure.colorbar(image, ax=axes, label="expert", ticks=MaxNLocator(integer=True))
    axes.set_yticks(range(len(first_choice)))
    axes.set_ylabel("layer")
    axes.set_xlabel("token")
    axes.set_title("First choice of each token", loc="left", fontsize=10)
    return figure
