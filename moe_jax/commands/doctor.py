"""`python -m moe_jax doctor`."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from moe_jax import environment
from moe_jax.config import ConfigError


@dataclass(frozen=True)
class Doctor:
    """Verify every checkpoint of a run, to the last array."""

    run: str
    """Folder of a run."""
    repair: bool = False
    """Mend what can be mended. Damaged checkpoints are renamed, never removed."""

    def execute(self) -> int:
        """0 where all is well, or is now."""
        folder = Path(self.run)
        if not (folder / "checkpoints").is_dir():
            raise ConfigError(f"--run {self.run}: no folder of a run; it has no checkpoints")
        environment.prepare()
        from moe_jax.training.doctor import examine
        from moe_jax.training.run import locked

        writable = self.repair or os.access(folder, os.W_OK)
        with locked(folder) if writable else contextlib.nullcontext():
            findings = examine(folder, self.repair)
        width = max(len(f.what) for f in findings)
        for finding in findings:
            print(f"{finding.what:<{width}}  {finding.state:<8}  {finding.detail}".rstrip())
        ill = sum(f.state == "damaged" for f in findings)
        if ill:
            print(f"{ill} damaged" + ("" if self.repair else "; --repair mends what can be mended"))
        return 1 if ill else 0
