"""The base classes of commands, their list, and what they check. A command is a frozen dataclass of its arguments.

The arguments are accepted first. Only then does `execute` import what it needs, jax included. It returns the exit
status.
"""

import dataclasses
import importlib
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from moe_jax.cli.arguments import Argument, arguments_of, perhaps, read, require
from moe_jax.config import ConfigError, RunConfig, holds_run
from moe_jax.config.run import missing_run
from moe_jax.config.section import format_bound
from moe_jax.model.costs import least_step_bytes
from moe_jax.runs.catalog import run_or_default, title
from moe_jax.system.environment import GIB, machine_memory, runs_on_cpu
from moe_jax.system.files import Folder, json_text, step_number

COMMANDS = {
    "train": ("train", "Train", "train a sparse mixture-of-experts language model"),
    "sft": ("train", "Sft", "fine-tune a trained model on conversations, whole or by LoRA"),
    "import": ("import_model", "Import", "bring a public mixture here as a run of 4, 8 or 16 bits"),
    "quantize": ("export", "Quantize", "write a run with 8 or 4 bits a weight"),
    "generate": ("generate", "Generate", "continue a text with a trained model"),
    "chat": ("generate", "Chat", "talk with a trained model: type a beginning, and it goes on"),
    "serve": ("serve", "Serve", "serve a trained model: OpenAI's API, and a page"),
    "evaluate": ("evaluate", "Evaluate", "measure loss, bits per byte and drops of a model on a text"),
    "inspect": ("inspect", "Inspect", "write an HTML page that shows where every token went"),
    "runs": ("runs", "Runs", "list the trained runs, and the models that come with moe-jax"),
    "plan": ("plan", "Plan", "find settings that fit a GPU, or several"),
    "export": ("export", "Export", "write a model for transformers, llama.cpp, ollama, or as a page"),
    "doctor": ("inspect", "Doctor", "verify every checkpoint of a run, and repair what can be"),
    "certify": ("certify", "Certify", "test causality, arithmetic and memory of a model"),
    "plot": ("inspect", "Plot", "draw pictures of one run, or of several compared"),
}
"""Name -> (module, class in it, one line of help)."""


MOST_ACTIVE = 4096
"""Most experts of any model, and so the bound of --active before a model is opened."""


class Command(ABC):
    """A command with its values, of the right types. Subclasses check what the values mean."""

    usual: ClassVar[Sequence[str]] = ()
    """The flags that help shows unless `--help all` is typed. Empty: all."""

    @classmethod
    def arguments(cls) -> list[Argument]:
        """The arguments that the command accepts."""
        return list(arguments_of(cls))

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        """The command with the values from argv. Raises ConfigError."""
        arguments = cls.arguments()
        values = read(arguments, argv)
        require(arguments, values)
        return cls(**{name: value for (_, name), value in values.items()})

    @abstractmethod
    def execute(self) -> int:
        """Run the command. Returns the exit status."""


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    """A command that reads a checkpoint of a run."""

    run: str = ""
    """Folder of a run; or its name in runs/, or a model that comes with moe-jax: nano, stories. Empty: the newest run
    in runs/, else stories."""
    step: int | None = None
    """Step of the checkpoint to load. Default: the best one."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        command = super().parse(argv)
        return dataclasses.replace(command, run=str(run_or_default(command.run)))

    @property
    def name(self) -> str:
        """The run in messages."""
        return title(Path(self.run))

    def check(self) -> None:
        """Raise ConfigError unless the run has such a checkpoint."""
        check_run_folder(self.run, self.step)


def command(name: str) -> type[Command]:
    """The class of a command. Raises ConfigError for an unknown name."""
    if name not in COMMANDS:
        near = perhaps(name, {known: known for known in COMMANDS})
        raise ConfigError(f"{name}: must be one of {', '.join(COMMANDS)}{near}")
    module, kind, _ = COMMANDS[name]
    return getattr(importlib.import_module(f"moe_jax.cli.{module}"), kind)


def check_run_folder(run: str, step: int | None = None) -> None:
    """Raise ConfigError unless the folder holds a run with a complete checkpoint, and one of `step` if it is given."""
    if not holds_run(Path(run)):
        raise ConfigError(missing_run("--run", run))
    if step is None:
        return
    steps = sorted(s for name in Folder(Path(run)).names("checkpoints") if (s := step_number(name)) is not None)
    if step not in steps:
        raise ConfigError(f"--step {step}: {run} has no such checkpoint; it has {', '.join(map(str, steps))}")


def check_range(flag: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value}: must be between {format_bound(low)} and {format_bound(high)}")


# Outputs that cannot be written, and training steps that cannot be in memory


def check_memory(config: RunConfig) -> None:
    """Raise ConfigError if a training step needs more memory than this machine has.

    Only for a CPU without --memory. Elsewhere the run is made to fit.
    """
    least, memory = least_step_bytes(config), machine_memory()
    if runs_on_cpu() and memory is not None and least > memory and not config.execution.memory:
        raise ConfigError(
            f"--seq-len {config.model.seq_len}, --batch-size {config.train.batch_size}: a training step needs at least "
            f"{least / GIB:,.1f} GiB, and this machine has {memory / GIB:,.1f} GiB; use a smaller --seq-len or model, "
            "or give the run some of it with --memory, such as --memory 8GB"
        )


def check_out_folder(flag: str, path: str | Path) -> None:
    """Raise ConfigError unless a folder of this name exists and can be written, or can be made."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{flag} {path}: is a file; name a folder")
    _check_writable(flag, Path(path), Path(path))


def check_new_folder(flag: str, path: str | Path) -> None:
    """Raise ConfigError unless a folder of this name can be made, or is there and empty."""
    check_out_folder(flag, path)
    if os.path.isdir(path) and os.listdir(path):
        raise ConfigError(f"{flag} {path}: is not empty; name a new folder")


def check_whole_folder(flag: str, path: Path) -> None:
    """The same of a folder that is made elsewhere and gets its name at the end. So it can be no link and no mount."""
    check_new_folder(flag, path)
    if path.is_symlink() or os.path.ismount(path) or (path.exists() and path.samefile(".")):
        raise ConfigError(f"{flag} {path}: is a link, a mount or the current folder; name a new folder inside it")


def check_out_file(flag: str, path: str | Path) -> None:
    """Raise ConfigError unless a file of this name can be written, perhaps after its folder is made."""
    if os.path.isdir(path):
        raise ConfigError(f"{flag} {path}: is a folder; name a file")
    if os.path.islink(path) and not os.path.exists(path):
        raise ConfigError(f"{flag} {path}: is a link to something that does not exist; name a file")
    _check_writable(flag, Path(path), Path(path).parent)


def _check_writable(flag: str, path: Path, folder: Path) -> None:
    """Try to make a folder in `folder`, or in the nearest folder above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    draft = folder / f".{secrets.token_hex(8)}"
    try:
        draft.mkdir()
        draft.rmdir()
    except OSError as error:
        here = "" if folder == path else f"{folder} "
        raise ConfigError(f"{flag} {path}: {here}cannot be written ({error.strerror}); name another") from None


# What commands print


def print_json(result: dict[str, Any], asked: bool) -> None:
    """Print the result as one line of JSON if it was asked for, or if the output is a file or a pipe."""
    if asked or not sys.stdout.isatty():
        print(json_text(result))
