"""The base classes of commands, and their list. A command is a frozen dataclass of its arguments.

The arguments are accepted first. Only then does `execute` import what it needs, jax included. It returns the exit
status.
"""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from moe_jax.cli.arguments import Argument, arguments_of, perhaps, read, require
from moe_jax.config import ConfigError, holds_run
from moe_jax.config.run import missing_run
from moe_jax.config.section import format_bound
from moe_jax.system.files import Folder, json_text, step_number

COMMANDS = {
    "train": ("train", "Train", "train a sparse mixture-of-experts language model"),
    "sft": ("train", "Sft", "fine-tune a trained model on conversations, whole or by LoRA"),
    "merge": ("export", "Merge", "write a run with adapters as an ordinary run"),
    "quantize": ("export", "Quantize", "write a run with 8 or 4 bits a weight"),
    "generate": ("generate", "Generate", "continue a text with a trained model"),
    "chat": ("generate", "Chat", "talk with a trained model: a beginning in, its continuation out"),
    "serve": ("serve", "Serve", "serve a trained model: OpenAI's API, and a page"),
    "evaluate": ("evaluate", "Evaluate", "measure loss, bits per byte and drops of a model on a text"),
    "inspect": ("inspect", "Inspect", "write an HTML page that shows where every token went"),
    "presets": ("presets", "Presets", "print what each preset is for, and what it costs here"),
    "plan": ("plan", "Plan", "find settings that fit a GPU, or a text and a memory"),
    "export": ("export", "Export", "write a model for transformers, llama.cpp or ollama"),
    "doctor": ("inspect", "Doctor", "verify every checkpoint of a run, and repair what can be"),
    "verify-resume": ("train", "VerifyResume", "show that a killed and resumed run loses nothing"),
    "certify": ("certify", "Certify", "test causality, arithmetic and memory of a model"),
    "plot": ("inspect", "Plot", "draw pictures of one run, or of several compared"),
    "benchmark": ("benchmark", "Benchmark", "measure what the model costs on this machine"),
    "completion": ("help", "Completion", "print a script for completion in a shell"),
}
"""Name -> (module, class in it, one line of help)."""


class Group(NamedTuple):
    """Arguments that help shows together."""

    title: str
    about: str
    arguments: list[Argument]
    rare: bool = False
    """Whether only `--help all` shows it."""


class Command(ABC):
    """A command with its values, of the right types. Subclasses check what the values mean."""

    interrupted: ClassVar[str] = "nothing was written"
    """What Ctrl-C leaves of the command's work. Printed after "interrupted; "."""

    @classmethod
    def arguments(cls) -> list[Argument]:
        """The arguments that the command accepts."""
        return list(arguments_of(cls))

    @classmethod
    def groups(cls, argv: Sequence[str] = ()) -> list[Group]:
        """The arguments as help shows them. Defaults may depend on the rest of the command line."""
        return [Group("arguments", "", cls.arguments())]

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

    run: str
    """Folder of a run."""
    step: int | None = None
    """Step of the checkpoint to load. The best one unless given."""

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


def print_json(result: dict[str, Any], asked: bool) -> None:
    """Print the result as one line of JSON if it was asked for, or if the output is a file or a pipe."""
    if asked or not sys.stdout.isatty():
        print(json_text(result))


def print_next(text: str) -> None:
    """Tell a person at a terminal what to do next."""
    if sys.stdout.isatty():
        print(f"next: {text}")
