"""`benchmark.py`: which measures to take, and where their numbers go."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moe_jax import environment
from moe_jax.commands import check_range
from moe_jax.config import PresetName
from moe_jax.presets import preset, with_vocabulary

Part = Literal["moe", "train", "decode", "all"]


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
    save: bool = True
    """Write the results into `benchmarks/`."""

    def execute(self) -> int:
        check_range("--batch-size", self.batch_size, 1, 4096)
        check_range("--rounds", self.rounds, 1, 10_000)
        environment.prepare()
        from rich.console import Console

        from moe_jax.analysis.bench import machine, report

        console = Console(highlight=False)
        config = with_vocabulary(preset(self.preset))
        about = machine.describe()
        console.print(
            f"[bold]{self.preset}[/bold] on {about['processor']}, {about['cores']} cores, {about['device']}\n"
        )
        parts = ["moe", "train", "decode"] if self.part == "all" else [self.part]
        results: dict[str, Any] = {}
        for part in parts:
            results[part] = report.PARTS[part](console, config, self.batch_size, self.rounds)
        document = {"preset": self.preset, "batch_size": self.batch_size, **results}
        if self.save:
            self._save(document, about)
        print(json.dumps(results[self.part] if self.part != "all" else document))
        return 0

    def _save(self, document: dict[str, Any], about: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        path = Path("benchmarks") / f"{now:%Y-%m-%d-%H%M}-{self.part}-{self.preset}.json"
        path.parent.mkdir(exist_ok=True)
        command = f"uv run benchmark.py {self.part} --preset {self.preset} --rounds {self.rounds}"
        record = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": about, **document}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"saved in {path}")
