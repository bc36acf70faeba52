"""`python -m moe_jax plan`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax import environment
from moe_jax.config import ConfigError, PresetName, UserError
from moe_jax.presets import preset, with_vocabulary

if TYPE_CHECKING:
    from moe_jax.analysis.gpu_memory import Target
    from moe_jax.analysis.gpu_plan import Row


@dataclass(frozen=True)
class Plan:
    """Which settings of a preset fit a GPU that need not be there. The last line is JSON; 0 if a setting fits."""

    preset: PresetName = "seed-158m"
    """What to train."""
    gpu: str = "rtx3050-4gb"
    """A target that comes with the package (a wrong name lists them), or a file that describes one."""
    every_optimizer: bool = False
    """Compile each optimizer, instead of stopping at the first setting that fits."""
    verify: bool = False
    """Plan for the card in this machine, take two steps on it, and compare the peak with the plan."""

    def execute(self) -> int:
        if not self.verify:
            self._check_target()
            os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for a card neither needs nor takes the one that is here
        environment.prepare()
        import jax

        from moe_jax.analysis import gpu_memory, gpu_plan

        if self.verify and jax.devices()[0].platform != "gpu":
            raise UserError("--verify: no NVIDIA GPU is visible to JAX; leave it out to plan without one")
        target = gpu_memory.describe(jax.devices()[0]) if self.verify else gpu_memory.load_target(self.gpu)
        print(
            f"{self.preset} on {target.device_kind} (compute capability {target.compute_capability}, "
            f"{target.memory / gpu_memory.MIB:,.0f} MiB): a plan may use {target.budget:,.0f} MiB"
        )
        _print_header()
        rows = []
        for row in gpu_plan.search(with_vocabulary(preset(self.preset)), target, self.every_optimizer):
            rows.append(row)
            _print_row(row)
        return self._report(rows, target)

    def _check_target(self) -> None:
        names = sorted(p.stem for p in environment.GPU_TARGETS.glob("*.txtpb"))
        if self.gpu not in names and not Path(self.gpu).is_file():
            raise ConfigError(f"--gpu {self.gpu}: must be one of {', '.join(names)}, or a file that describes a card")

    def _report(self, rows: "list[Row]", target: "Target") -> int:
        from moe_jax.analysis import gpu_plan

        verdict = gpu_plan.verdict(rows, target)
        train = verdict.row.config.train
        print("\nbetween steps, with the optimizer's state waiting:", end=" ")
        print(", ".join(f"{name} {mib:,.0f} MiB" for name, mib in verdict.between.items()))
        if verdict.fits:
            print(
                f"XLA's buffer plan fits: uv run train.py --preset {self.preset} --batch-size {train.batch_size} "
                f"--grad-accum {train.grad_accum} --optimizer {train.optimizer}" + " --train.remat" * train.remat
            )
        else:
            print("nothing fits: take a smaller --seq-len, fewer or smaller experts, or another card")
        result = verdict.summary(target)
        if self.verify:
            result["peak_mib"] = peak = gpu_plan.measured_peak(verdict.row.config)
            planned = verdict.row.step.total
            result["peak_over_plan"] = peak / planned
            print(f"measured peak {peak:,.0f} MiB: {peak / planned - 1:+.1%} of the plan for the step")
        print(json.dumps(result))
        return 0 if verdict.fits else 1


_COLUMNS = "{:<11} {:>6} {:>6} {:>11} {:>10} {:>8} {:>10} {:>9}  {}"


def _print_header() -> None:
    names = ("optimizer", "micro", "accum", "weights B/p", "state B/p", "remat", "precision", "step MiB", "fits")
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
            "yes" if train.remat else "no",
            row.precision,
            f"{row.step.total:,.0f}",
            "yes" if row.fits else "no",
        ),
        flush=True,
    )
