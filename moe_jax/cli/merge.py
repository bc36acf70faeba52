"""`moe-jax merge`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_jax.cli.command import Command, check_run_folder
from moe_jax.cli.outputs import check_new_folder
from moe_jax.config import ConfigError, load_config
from moe_jax.system import environment
from moe_jax.system.terminal import say, working


@dataclass(frozen=True)
class Merge(Command):
    """Write a run that has adapters (`sft --lora`) as an ordinary run: the adapters are added to the weights.

    The other commands need no merge: they add the adapters in memory.
    """

    interrupted: ClassVar[str] = "the merged run is not complete; remove its folder and start again"

    run: str
    """Folder of a run with adapters."""
    out: str
    """The folder of the new run."""
    step: int | None = None
    """Step of the checkpoint to merge. The best one unless given."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        check_new_folder("--out", self.out)
        out = Path(self.out)
        config = load_config(Path(self.run))
        if config is not None and not config.train.lora_rank:
            raise ConfigError(f"--run {self.run}: has no adapters, so it is an ordinary run already; copy its folder")
        environment.prepare_environment()
        with working(f"merging {self.run}"):
            from moe_jax.training.derived_runs import merge

            made = merge(Path(self.run), out, self.step)
        say(f"{made}: the weights with the adapters added")
        print(f"next: uv run python -m moe_jax chat --run {shlex.quote(str(out))}")
        return 0
