"""`benchmark.py`: which measures to take, and where their numbers go."""

import contextlib
import datetime
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from moe_jax import environment
from moe_jax.commands import check_range
from moe_jax.config import Dense, PresetName, UserError
from moe_jax.presets import preset, with_vocabulary

Part = Literal["moe", "train", "decode", "surroundings", "memory", "peers", "all"]
EXTRAS = {"memory": ("gpu-plan", "JAX's CUDA plugin"), "peers": ("peers", "PyTorch and transformers")}
"""Part -> the extra that it needs, and what that brings."""
TRAINING = {"moe", "train", "peers"}
"""Parts that time a training step, in the precision that is chosen for this machine. The others compute in float32, or
plan for cards that have their own."""


@dataclass(frozen=True)
class Benchmark:
    """What the model costs on this machine. The last line is JSON."""

    part: Annotated[Part, tyro.conf.Positional] = "all"
    """Which measures to take."""
    preset: PresetName = "seed-158m"
    """Shape of the model."""
    batch_size: int = 8
    """Sequences of a training step."""
    rounds: int = 9
    """Times that each candidate runs; medians are compared."""
    uniform_routing: bool = False
    """Spread tokens evenly over the experts, whatever the routers say."""
    with_quality: str = ""
    """Folder of `python -m moe_jax compare`, whose bits per byte `train` shows beside the costs."""
    save: bool = True
    """Write the results into `benchmarks/`, and for `train` a picture."""

    def execute(self) -> int:
        check_range("--batch-size", self.batch_size, 1, 4096)
        check_range("--rounds", self.rounds, 1, 10_000)
        parts = self._parts()
        if parts == ["memory"]:
            os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for a card neither needs nor takes the one that is here
        environment.prepare()
        from rich.console import Console

        from moe_jax.analysis.bench import machine, part, report
        from moe_jax.analysis.bench.uniform import uniform_routing
        from moe_jax.model.precision import choose_policy

        console = Console(highlight=False)
        config = with_vocabulary(preset(self.preset))
        about = machine.describe()
        console.print(
            f"[bold]{self.preset}[/bold] on {about['processor']}, {about['cores']} cores, {about['device']}\n"
        )
        results: dict[str, Any] = {}
        ask = part.Ask(config, self.batch_size, self.rounds, self._quality())
        with uniform_routing() if self.uniform_routing else contextlib.nullcontext():
            for name in parts:
                results[name] = report.PARTS[name](console, ask)
        settings: dict[str, Any] = {"preset": self.preset, "batch_size": self.batch_size}
        if self.uniform_routing:
            settings["uniform_routing"] = True
        if not TRAINING.isdisjoint(parts):
            settings["training_precision"] = choose_policy(config.train.precision).compute
        document = {**settings, **results}
        if self.save:
            self._save(document, about)
        print(json.dumps(results[self.part] if self.part != "all" else document))
        return 0

    def _quality(self) -> dict[Dense, float] | None:
        """Raises UserError where the folder has no comparison of the preset."""
        from moe_jax.analysis.bench.twins import read_quality

        return read_quality(Path(self.with_quality), self.preset) if self.with_quality else None

    def _parts(self) -> list[str]:
        """The parts to run. Raises UserError where the one that was asked for needs an extra; `all` leaves it out."""
        missing = {part for part in EXTRAS if not _can_run(part)}
        if self.part != "all":
            if self.part in missing:
                extra, what = EXTRAS[self.part]
                raise UserError(f"{self.part} needs {what}: uv run --extra {extra} benchmark.py {self.part}")
            return [self.part]
        for part in sorted(missing):
            print(f"left out: {part}, for which `uv run --extra {EXTRAS[part][0]} benchmark.py {part}`")
        return [part for part in get_args(Part) if part != "all" and part not in missing]

    def _save(self, document: dict[str, Any], about: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        path = Path("benchmarks") / f"{now:%Y-%m-%d-%H%M}-{self.part}-{self.preset}.json"
        path.parent.mkdir(exist_ok=True)
        extra = f"--extra {EXTRAS[self.part][0]} " if self.part in EXTRAS else ""
        command = f"uv run {extra}benchmark.py {self.part} --preset {self.preset}"
        command += f" --batch-size {self.batch_size} --rounds {self.rounds}"
        command += " --uniform-routing" if self.uniform_routing else ""
        command += f" --with-quality {self.with_quality}" if self.with_quality else ""
        record = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": about, **document}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"saved in {path}")
        if "train" in document:
            self._draw(document["train"]["models"], path.with_suffix(".png"))

    def _draw(self, models: dict[str, dict[str, float]], path: Path) -> None:
        from moe_jax.analysis.bench.twins import twins_figure

        if importlib.util.find_spec("matplotlib") is None:
            print("no picture: `uv run --extra plots benchmark.py train` draws one")
            return
        twins_figure(self.preset, models).savefig(path, dpi=150)
        print(f"drawn in {path}")


def _can_run(part: str) -> bool:
    """Whether the extra of a part is installed."""
    if part == "memory":
        return environment.has_cuda_plugin()
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
