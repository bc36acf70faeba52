"""The base class of all commands, and their list. A command is a frozen dataclass of its arguments, in a file of its
name.

The arguments are accepted first. Only then does `execute` import what it needs, jax included. It returns the exit
status.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from moe_jax.cli.arguments import Argument, arguments_of, perhaps, read, require
from moe_jax.config import ConfigError, holds_run
from moe_jax.config.saved import missing_run
from moe_jax.config.section import format_bound
from moe_jax.system.files import Folder, step_number

COMMANDS = {
    "train": ("Train", "train a sparse mixture-of-experts language model"),
    "sft": ("Sft", "fine-tune a trained model on conversations, whole or by LoRA"),
    "merge": ("Merge", "write a run with adapters as an ordinary run"),
    "quantize": ("Quantize", "write a run with 8 or 4 bits a weight"),
    "generate": ("Generate", "continue a text with a trained model"),
    "chat": ("Chat", "talk with a trained model: a beginning in, its continuation out"),
    "serve": ("Serve", "serve a trained model: OpenAI's API, and a page"),
    "evaluate": ("Evaluate", "measure loss, bits per byte and drops of a model on a text"),
    "inspect": ("Inspect", "write an HTML page that shows where every token went"),
    "presets": ("Presets", "print what each preset is for, and what it costs here"),
    "plan": ("Plan", "find settings that fit a GPU, or a text and a memory"),
    "export": ("Export", "write a model for transformers, llama.cpp or ollama"),
    "doctor": ("Doctor", "verify every checkpoint of a run, and mend what can be"),
    "verify-resume": ("VerifyResume", "show that a killed and resumed run loses nothing"),
    "certify": ("Certify", "test causality, arithmetic and memory of a model"),
    "plot": ("Plot", "draw pictures of one run, or of several compared"),
    "benchmark": ("Benchmark", "measure what the model costs on this machine"),
    "completion": ("Completion", "print a script for completion in a shell"),
}
"""Name -> (class in the module of that name, one line of help)."""


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


def command(name: str) -> type[Command]:
    """The class of a command. Raises ConfigError for an unknown name."""
    if name not in COMMANDS:
        near = perhaps(name, {known: known for known in COMMANDS})
        raise ConfigError(f"{name}: must be one of {', '.join(COMMANDS)}{near}")
    module = importlib.import_module("moe_jax.cli." + name.replace("-", "_"))
    return getattr(module, COMMANDS[name][0])


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
