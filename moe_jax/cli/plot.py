"""`moe-jax plot`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_jax.cli.checks import check_out_folder
from moe_jax.cli.command import Command, check_run_folder
from moe_jax.system import environment
from moe_jax.system.terminal import say, working


@dataclass(frozen=True)
class Plot(Command):
    """Draw pictures of a run, as PNG and SVG: loss, bits per byte, learning rate, throughput, load of the experts.

    With several runs, each picture compares them.
    """

    interrupted: ClassVar[str] = "some pictures were not drawn; run it again"

    run: list[str]
    """Folder of a run. Repeat the flag to compare several."""
    out: str = ""
    """Folder for the pictures. Empty: RUN/report of the first run."""

    def execute(self) -> int:
        for run in self.run:
            check_run_folder(run)
        if self.out:
            check_out_folder("--out", self.out)
        environment.prepare_environment()
        with working("drawing the pictures"):
            from moe_jax.plots.figures import run_figures, save_figures
            from moe_jax.system.files import Folder

            figures = run_figures([Path(run) for run in self.run])
            if self.out:
                Path(self.out).mkdir(parents=True, exist_ok=True)
                out = Folder(Path(self.out))
            else:
                out = Folder(Path(self.run[0])).inner("report")
            paths = save_figures(figures, out)
        say(*paths)
        return 0
