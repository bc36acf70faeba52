"""The commands of `python -m moe_jax`: a module each, with a dataclass of the command's arguments.

`execute` imports what it needs, jax above all, after its arguments are accepted, and returns the exit status.
"""

import importlib
from pathlib import Path
from typing import Any

from moe_jax.config import ConfigError, holds_run

COMMANDS = {
    "generate": ("Generate", "make a trained model tell stories"),
    "samples": ("Samples", "stories at fixed prompts and seeds, and how they repeat and vary beside the text"),
    "doctor": ("Doctor", "verify every checkpoint of a run, and repair what can be repaired"),
    "certify": ("Certify", "prove causality and compiled arithmetic of a model"),
    "plan": ("Plan", "which settings of a preset fit a GPU that need not be there"),
    "evaluate": ("Evaluate", "loss, bits per byte and drops of a trained model on any text"),
    "inspect": ("Inspect", "the routing report: one HTML page that shows where every token of a text went"),
    "compare": ("Compare", "a mixture of experts beside its dense twins, over seeds: same tokens, same wall clock"),
    "plot": ("Plot", "pictures of a run, or of several compared: loss, bits per byte, load of the experts, ..."),
}
"""Name, which is also that of the module -> (class, one line on it)."""


def command(name: str) -> type[Any]:
    """The class of a command. Raises ConfigError for an unknown name."""
    if name not in COMMANDS:
        raise ConfigError(f"{name}: must be one of {', '.join(COMMANDS)}")
    return getattr(importlib.import_module(f"moe_jax.commands.{name}"), COMMANDS[name][0])


def check_run_folder(run: str, step: int | None = None) -> None:
    """That a folder holds a run, and a checkpoint of the step that is asked for. Raises ConfigError."""
    if not holds_run(Path(run)):
        raise ConfigError(f"--run {run}: no run with a complete checkpoint there; make one with `uv run train.py`")
    checkpoints = Path(run) / "checkpoints"
    if step is not None and (step < 0 or not (checkpoints / f"step_{step:08d}").is_dir()):
        steps = sorted(int(p.name[5:]) for p in checkpoints.glob("step_*") if p.name[5:].isdigit())
        raise ConfigError(f"--step {step}: {run} has no such checkpoint; it has {', '.join(map(str, steps))}")


def check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value}: must be between {low:g} and {high:g}")
