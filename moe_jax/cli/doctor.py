"""`moe-jax doctor`."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from moe_jax.cli.command import Command
from moe_jax.config import ConfigError
from moe_jax.system import environment


@dataclass(frozen=True)
class Doctor(Command):
    """Verify every checkpoint of a run, each array included."""

    run: str
    """Folder of a run."""
    repair: bool = False
    """Repair what can be repaired. Damaged checkpoints are renamed, never removed."""

    def execute(self) -> int:
        """0 if nothing is damaged, or if all damage was repaired."""
        folder = Path(self.run)
        if not (folder / "checkpoints").is_dir():
            raise ConfigError(f"--run {self.run}: is not the folder of a run; it has no folder `checkpoints`")
        environment.prepare_environment()
        from moe_jax.runs.doctor import examine
        from moe_jax.runs.folder import locked_for_training

        writable = self.repair or os.access(folder, os.W_OK)
        with locked_for_training(folder) if writable else contextlib.nullcontext():
            findings = examine(folder, self.repair)
        width = max(len(f.what) for f in findings)
        for finding in findings:
            print(f"{finding.what:<{width}}  {finding.state:<8}  {finding.detail}".rstrip())
        ill = sum(f.state == "damaged" for f in findings)
        if ill:
            print(f"{ill} damaged" + ("" if self.repair else "; --repair repairs what can be repaired"))
        return 1 if ill else 0
