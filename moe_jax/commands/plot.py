"""`python -m moe_jax plot`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moe_jax import environment
from moe_jax.commands import check_run_folder


@dataclass(frozen=True)
class Plot:
    """Pictures of a run, as PNG and SVG: loss, bits per byte, learning rate, throughput, load of the experts. Several
    runs are compared."""

    run: Annotated[list[str], tyro.conf.UseAppendAction]
    """Folder of a run; repeat the flag to compare several."""
    out: str = ""
    """Folder for the pictures; RUN/report of the first run unless given."""

    def execute(self) -> int:
        for run in self.run:
            check_run_folder(run)
        environment.prepare()
        from moe_jax.analysis.plots import run_figures, save_figures

        out = Path(self.out) if self.out else Path(self.run[0]) / "report"
        for path in save_figures(run_figures([Path(run) for run in self.run]), out):
            print(path)
        return 0
