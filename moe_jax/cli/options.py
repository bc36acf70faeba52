"""What commands share: parameters, the checks of their values, the start of jax, and the last line of JSON."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.section import format_bound
from moe_jax.model.costs import least_step_bytes
from moe_jax.runs.catalog import holds_run, missing_run, run_or_default
from moe_jax.system import environment
from moe_jax.system.environment import GIB, machine_memory, runs_on_cpu
from moe_jax.system.files import json_text, steps_in
from moe_jax.system.terminal import working

_RUN = (
    "Folder of a run; or its name in runs/, or a model that comes with moe-jax: nano, nano-chat, stories. Empty: the "
    "newest run in runs/, else stories."
)
_ACTIVE = "Experts that a token chooses, fewer than in training: faster, but less accurate. 0: as trained."
RunName = Annotated[str, tyro.conf.arg(help=_RUN)]
StepNumber = Annotated[int | None, tyro.conf.arg(help="Step of the checkpoint to load. Default: the best one.")]
Active = Annotated[int, tyro.conf.arg(help=_ACTIVE)]
Json = Annotated[bool, tyro.conf.arg(help="Print the result as JSON too.")]


def checked_run(run: str, step: int | None = None) -> Path:
    """The folder of the run that --run names, or of the default one.

    Raises ConfigError unless it holds a complete checkpoint, and one of `step` if that is given.
    """
    folder = run_or_default(run)
    if not holds_run(folder):
        raise ConfigError(missing_run("--run", folder))
    steps = steps_in(folder / "checkpoints")
    if step is not None and step not in steps:
        raise ConfigError(f"--step {step}: {folder} has no such checkpoint; it has {', '.join(map(str, steps))}")
    return folder


def check_range(flag: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value}: must be between {format_bound(low)} and {format_bound(high)}")


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


def check_out_folder(flag: str, path: str | Path, new: bool = False) -> None:
    """Raise ConfigError unless a folder of this name exists and can be written, or can be made.

    With `new`, it must be missing or empty. It is made elsewhere and gets its name at the end, so it can be no link, no
    mount and not the current folder.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{flag} {path}: is a file; name a folder")
    if new and os.path.isdir(path) and os.listdir(path):
        raise ConfigError(f"{flag} {path}: is not empty; name a new folder")
    if new and (os.path.islink(path) or os.path.ismount(path) or Path(path).resolve() == Path.cwd()):
        raise ConfigError(f"{flag} {path}: is a link, a mount or the current folder; name a new folder inside it")
    _check_writable(flag, Path(path))


def check_out_file(flag: str, path: str | Path) -> None:
    """Raise ConfigError unless a file of this name can be written, perhaps after its folder is made."""
    if os.path.isdir(path):
        raise ConfigError(f"{flag} {path}: is a folder; name a file")
    _check_writable(flag, Path(path))


def _check_writable(flag: str, path: Path) -> None:
    """Raise ConfigError unless the path, or the nearest folder above it that exists, can be written."""
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK) or (nearest != path and not nearest.is_dir()):
        raise ConfigError(f"{flag} {path}: {nearest} cannot be written; name another")


@contextmanager
def starting(what: str) -> Iterator[None]:
    """Set the environment of jax, which is imported in the block, and show on a terminal what is done meanwhile."""
    notes = environment.prepare_environment()
    with working(what):
        yield
    note_device(notes)


def note_device(notes: Sequence[str]) -> None:
    """Say on stderr what was noted of the card, and why it is not used if it is not."""
    if environment.has_nvidia_card():
        import jax

        for note in (*notes, *environment.unused_card(jax.devices()[0].platform)):
            print(note, file=sys.stderr)


def print_json(result: dict[str, Any], asked: bool) -> None:
    """Print the result as one line of JSON if it was asked for, or if the output is a file or a pipe."""
    if asked or not sys.stdout.isatty():
        print(json_text(result))
