"""`moe-jax doctor`."""

import collections
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_jax.cli.command import Command
from moe_jax.config import ConfigError
from moe_jax.system import environment
from moe_jax.system.files import Folder
from moe_jax.system.terminal import say, working


@dataclass(frozen=True)
class Doctor(Command):
    """Verify every checkpoint of a run, each array included."""

    interrupted: ClassVar[str] = "the checkpoints were not all verified; run it again"

    run: str
    """Folder of a run."""
    repair: bool = False
    """Repair what can be repaired. Damaged checkpoints are renamed, never removed."""

    def execute(self) -> int:
        """0 if nothing is damaged, or if all damage was repaired."""
        folder = Path(self.run)
        if not Folder(folder).exists("checkpoints"):
            raise ConfigError(f"--run {self.run}: is not the folder of a run; it has no folder `checkpoints`")
        environment.prepare_environment()
        with working(f"reading every checkpoint of {folder}"):
            from moe_jax.runs.doctor import ILL, examine
            from moe_jax.runs.folder import locked_for_training

            writable = self.repair or os.access(folder, os.W_OK)
            with locked_for_training(folder) if writable else contextlib.nullcontext():
                findings = examine(folder, self.repair)
        width = max(len(f.what) for f in findings)
        for finding in findings:
            say(f"{finding.what:<{width}}  {finding.state:<8}  {finding.detail}".rstrip())
        ill = collections.Counter(f.state for f in findings if f.state in ILL)
        if ill:
            said = ", ".join(f"{count} {state}" for state, count in ill.items())
            say(said + ("" if self.repair else "; --repair repairs what can be repaired"))
        return 1 if ill else 0
