"""`moe-jax plan`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe_jax.cli.command import Command
from moe_jax.config import ConfigError, PresetName, UserError
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system import environment
from moe_jax.system.json_text import json_text

if TYPE_CHECKING:
    from moe_jax.planning.device_memory import Target
    from moe_jax.planning.search import Row


TARGETS = Path(__file__).parents[1] / "planning" / "targets"
"""Folder of the GPU descriptions that come with the package."""

LONGEST_DESCRIPTION = 1 << 20
"""Bytes. The descriptions that come with the package have about 2,000."""


@dataclass(frozen=True)
class Plan(Command):
    """Find the settings of a preset that fit a GPU. The GPU need not be in this machine.

    The last line of the output is JSON. The exit status is 0 if a setting fits, and 1 if none fits.
    """

    interrupted: ClassVar[str] = "the search stopped early; it starts quickly again, because its results are kept"

    preset: PresetName = "seed-158m"
    """The settings to plan for."""
    gpu: str = "rtx3050-4gb"
    """Name of a described GPU (a wrong name lists all names), or a file that describes one."""
    every_optimizer: bool = False
    """Compile each optimizer, instead of stopping at the first setting that fits."""
    verify: bool = False
    """Plan for the GPU in this machine, train two steps on it, and compare its peak memory with the plan."""

    def execute(self) -> int:
        if not self.verify:
            self._check_target()
            # Compiling for a described card needs no card, and must not occupy a real one.
            os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        import jax

        from moe_jax.planning import device_memory, search

        if self.verify and jax.devices()[0].platform != "gpu":
            raise UserError("--verify: no NVIDIA GPU is visible to JAX; leave it out to plan without one")
        target = (
            device_memory.target_of_device(jax.devices()[0]) if self.verify else device_memory.load_target(self.gpu)
        )
        print(
            f"{self.preset} on {target.device_kind} (compute capability {target.compute_capability}, "
            f"{target.memory / device_memory.MIB:,.0f} MiB): a plan may use {target.budget:,.0f} MiB"
        )
        _print_header()
        rows = []
        for row in search.search(with_vocabulary(preset(self.preset)), target, self.every_optimizer):
            rows.append(row)
            _print_row(row)
        return self._report(rows, target)

    def _check_target(self) -> None:
        names = sorted(p.stem for p in TARGETS.glob("*.txtpb"))
        if self.gpu not in names and not Path(self.gpu).is_file():
            raise ConfigError(f"--gpu {self.gpu}: must be one of {', '.join(names)}, or a file that describes a GPU")
        if self.gpu not in names:
            with open(self.gpu, "rb") as file:
                start = file.read(LONGEST_DESCRIPTION + 1)
            if len(start) > LONGEST_DESCRIPTION or b"\0" in start or b"device_memory_size" not in start:
                raise ConfigError(
                    f"--gpu {self.gpu}: does not describe a GPU; the files in {TARGETS} show how one does"
                )

    def _report(self, rows: "list[Row]", target: "Target") -> int:
        from moe_jax.planning import search

        verdict = search.verdict(rows, target)
        train = verdict.row.config.train
        print("\nbetween steps, the optimizer state included:", end=" ")
        print(", ".join(f"{name} {mib:,.0f} MiB" for name, mib in verdict.between.items()))
        if verdict.fits:
            print(
                "this setting fits, by XLA's buffer plan: "
                f"uv run train.py --preset {self.preset} --batch-size {train.batch_size} "
                f"--grad-accum {train.grad_accum} --optimizer {train.optimizer}"
                + " --execution.remat"
                * verdict.row.config.execution.remat
            )
        else:
            print("no setting fits: try a smaller --seq-len, fewer or smaller experts, or another card")
        result = verdict.summary(target)
        if self.verify:
            result["peak_mib"] = peak = search.measured_peak(verdict.row.config)
            planned = verdict.row.step.total
            result["peak_over_plan"] = peak / planned
            print(
                f"measured peak {peak:,.0f} MiB, "
                f"{peak / planned - 1:+.1%} against the {planned:,.0f} MiB planned for the step"
            )
        print(json_text(result))
        return 0 if verdict.fits else 1


_COLUMNS = "{:<10} {:>6} {:>6} {:>11} {:>9} {:>6} {:>9} {:>8}  {}"
"""80 columns at most."""


def _print_header() -> None:
    names = ("optimizer", "micro", "accum", "weights B/p", "state B/p", "remat", "precision", "step MiB", "fits")
    print("(B/p: bytes for each parameter; micro: sequences of a micro-batch)")
    print(_COLUMNS.format(*names))


def _print_row(row: "Row") -> None:
    train = row.config.train
    print(
        _COLUMNS.format(
            train.optimizer,
            train.batch_size,
            train.grad_accum,
            f"{row.weight_bytes:.2f}",
            f"{row.state_bytes:.2f}",
            "yes" if row.config.execution.remat else "no",
            row.precision,
            f"{row.step.total:,.0f}",
            "yes" if row.fits else "no",
        ),
        flush=True,
    )
