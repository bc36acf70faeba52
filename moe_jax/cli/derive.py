"""`moe-jax merge` and `moe-jax quantize`: a new run made of a trained one."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from moe_jax.cli.checks import check_new_folder
from moe_jax.cli.command import Command, check_run_folder, print_json
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


@dataclass(frozen=True)
class Quantize(Command):
    """Write a trained run with 8 or 4 bits a weight: smaller, and faster to decode.

    The validation text is scored before and after. The new run opens like any other, but it cannot be trained or
    exported. Activations stay as they are.

    The last line of the output is JSON if it is asked for, or if the output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the quantised run is not complete; remove its folder and start again"

    run: str
    """Folder of a run."""
    to: Literal["int8", "int4"]
    """int8: one scale for each output of a matrix. int4: one scale for each output and 32 inputs."""
    out: str = ""
    """The folder of the new run. Empty: the name of the run, with -int8 or -int4."""
    step: int | None = None
    """Step of the checkpoint to quantise. The best one unless given."""
    json: bool = False
    """Print the result as JSON too."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        run = Path(self.run)
        out = Path(self.out) if self.out else run.with_name(f"{run.resolve().name}-{self.to}")
        check_new_folder("--out", out)
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from moe_jax.training.derived_runs import quantize_run
        made = quantize_run(run, self.to, out, self.step)
        say(f"{made.checkpoint}: {self.to}")
        say(f"weights: {made.bytes_before / 1e6:,.2f} MB before, {made.bytes_after / 1e6:,.2f} MB after")
        result = {"bytes_before": made.bytes_before, "bytes_after": made.bytes_after}
        if made.before is None or made.after is None:
            say(f"not scored: {made.not_scored}")
        else:
            more = made.after.loss / made.before.loss - 1
            say(f"bits per byte: {made.before.bits_per_byte:.4f} before, {made.after.bits_per_byte:.4f} after")
            say(f"loss: {made.before.loss:.4f} before, {made.after.loss:.4f} after ({more:+.2%})")
            for name, scored in (("before", made.before), ("after", made.after)):
                result |= {f"val_loss_{name}": scored.loss, f"val_bits_per_byte_{name}": scored.bits_per_byte}
        print(f"next: uv run python -m moe_jax chat --run {shlex.quote(str(out))}")
        print_json(result, self.json)
        return 0
