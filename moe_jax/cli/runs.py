"""`moe-jax runs`."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_jax.config import UserError
from moe_jax.runs.catalog import RUNS, SHIPPED, is_shipped, runs_in, saved_at
from moe_jax.system.errors import shortened
from moe_jax.system.files import steps_in
from moe_jax.system.terminal import say

HEAD = ("name", "preset", "steps", "bits/byte", "parameters", "MB", "when")


def runs() -> int:
    """List the runs in `runs/`, newest first, and the models that come with moe-jax.

    --run NAME opens one, in every command that reads a model. Bits per byte are scores on the run's own validation
    text. Scores of different texts cannot be compared. MB is the size of the run's folder on disk.
    """
    rows = [HEAD, *(_row(run) for folder in (RUNS, SHIPPED) for run in runs_in(folder))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    say(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
    return 0


def _row(run: Path) -> tuple[str, ...]:
    from moe_jax.runs.records import read_summary

    summary: dict[str, Any] = {"steps": max(steps_in(run / "checkpoints"))}
    with suppress(UserError, OSError):  # the other runs are listed
        summary |= read_summary(run)  # a run that was stopped early has none
    values = [summary.get(name) for name in ("steps", "val_bits_per_byte", "params_total")]
    shown = [f"{v:,}" if isinstance(v, int) else f"{v:.4f}" if isinstance(v, float) else "-" for v in values]
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved_at(run)))
    when = "comes with moe-jax" if is_shipped(run) else date
    weights = f" ({summary['weights']})" if "weights" in summary else ""
    cells = run.name, f"{summary.get('preset', '-')}{weights}", *shown, f"{_folder_size(run) / 1e6:,.1f}", when
    return tuple(shortened(" ".join(cell.split()), 40) for cell in cells)  # a line end would begin another row


def _folder_size(folder: Path) -> int:
    """Bytes of all files in a folder. A file that is removed meanwhile counts nothing: training removes checkpoints."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size
