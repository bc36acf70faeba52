"""`moe-jax plot`."""

from pathlib import Path

import tyro

from moe_jax.cli.options import check_out_folder, checked_run, starting
from moe_jax.system.terminal import say


def plot(run: tyro.conf.UseAppendAction[list[str]], out: str = "") -> int:
    """Draw pictures of a run, as PNG and SVG: loss, bits per byte, learning rate, throughput, load of the experts.

    With several runs, each picture compares them.

    Args:
        run: Folder of a run. Repeat the flag to compare several.
        out: Folder for the pictures. Empty: RUN/report of the first run.
    """
    runs = [checked_run(name) for name in run or [""]]
    if out:
        check_out_folder("--out", out)
    with starting("sampling the pictures"):
        from moe_jax.plots import run_figures, save_figures

        figures = run_figures(runs)
        paths = save_figures(figures, Path(out) if out else runs[0] / "report")
    say(*paths)
    return 0
