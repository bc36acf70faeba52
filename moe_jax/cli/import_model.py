"""`moe-jax import`: a public model, to talk to and to look into."""

import dataclasses
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_jax.cli.arguments import POSITIONAL
from moe_jax.cli.command import Command, check_range, check_whole_folder
from moe_jax.system import environment
from moe_jax.system.terminal import say, working


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Bring a public mixture of experts here as a run: to talk to, to serve, to inspect and to evaluate.

    The weights are rounded while they are read, tensor by tensor, so a model that is much larger than the memory can be
    imported. The run has no state of an optimizer: to train a model, start from its folder by `train.py --init-from`.
    """

    source: str = dataclasses.field(metadata=POSITIONAL)
    """Folder of a model in Hugging Face's layout; or OWNER/NAME, which is downloaded from the hub."""
    weights: Literal["int4", "int8", "bfloat16"] = "int4"
    """Bits of a weight: 4.5, 8 or 16, scales included."""
    context: int = 1024
    """Most tokens that the run reads. The memory for keys and values grows with it."""
    out: str = ""
    """The folder of the run. Empty: runs/NAME, after the source."""

    def execute(self) -> int:
        check_range("--context", self.context, 2, 2**20)
        name = Path(self.source).resolve().name if Path(self.source).is_dir() else self.source.rpartition("/")[2]
        out = Path(self.out or f"runs/{name.lower()}")
        check_whole_folder("--out", out)
        environment.prepare_environment()
        with working(f"opening {self.source}"):
            from moe_jax.interop.imported_run import import_run
            from moe_jax.interop.model_folder import model_folder
            from moe_jax.interop.pretrained import Pretrained

        folder = model_folder(self.source)
        with working(f"opening {folder}"):
            model = Pretrained.open(folder, "SOURCE")
        began = time.perf_counter()
        made = import_run(model, self.weights, self.context, out)
        seconds = time.perf_counter() - began
        count = made.parameters
        say(f"{out}: {made.model_type}, {count.total / 1e6:,.0f} M parameters, {count.active / 1e6:,.0f} M for a token")
        rate = f"{made.bytes_read / seconds / 1e6:,.0f} MB/s"
        say(f"read {made.bytes_read / 1e9:.2f} GB, wrote {made.bytes_written / 1e9:.2f} GB: {seconds:.0f} s, {rate}")
        print(f"next: uv run moe-jax chat --run {shlex.quote(str(out))}")
        return 0
