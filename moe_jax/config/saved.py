"""The configuration that a run's folder holds, and what to say of a folder that holds none. Standard library only."""

import difflib
from pathlib import Path

from moe_jax.config.run import RunConfig
from moe_jax.system.errors import ConfigError, UserError
from moe_jax.system.files import Folder, step_number

MOST_NAMED = 4
"""Runs that a message lists where no name is near."""


def holds_run(run: Path) -> bool:
    """Whether a folder holds a complete checkpoint. A checkpoint gets its name only when it is complete, so names
    suffice. Raises UserError if the folder cannot be read: it may hold a run then."""
    folder = Folder(run)
    try:
        steps = [name for name in folder.names("checkpoints") if step_number(name) is not None]
        return any(not (run / "checkpoints" / name).is_file() for name in steps)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); fix this and try again") from None


def load_config(run: Path) -> RunConfig | None:
    """The saved configuration of a folder that holds a run, else None. Raises UserError where it cannot be read."""
    if not holds_run(run):
        return None
    repair = f"; `uv run python -m moe_jax doctor --run {run} --repair` takes it from a checkpoint"
    try:
        return RunConfig.from_dict(Folder(run).read_json("config.json"))
    except ConfigError:
        raise
    except OSError as error:  # a file that the system refuses to read may well be whole
        remedy = repair if isinstance(error, FileNotFoundError) else "; fix this and try again"
        raise UserError(f"{run / 'config.json'} cannot be read ({error.strerror}){remedy}") from error
    except ValueError as error:
        raise UserError(f"{run / 'config.json'} cannot be read ({error}){repair}") from error


def load_begun_config(run: Path) -> RunConfig | None:
    """The saved configuration of a run that ended before its first checkpoint. None where no run has begun, or where
    the folder holds a checkpoint. Raises UserError where the configuration cannot be read."""
    folder = Folder(run)
    try:
        if holds_run(run) or not folder.exists("config.json"):
            return None
        return RunConfig.from_dict(folder.read_json("config.json"))
    except (OSError, ValueError, UserError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{run / 'config.json'} cannot be read ({what}), and there is no checkpoint; "
            "leave --resume out to start a new run there"
        ) from error


def missing_run(flag: str, run: Path | str, remedy: str = "make one with `uv run train.py`") -> str:
    """The message for a flag whose folder holds no run. Names the runs with a similar name, else those beside it."""
    run = Path(run)
    hint = similar_runs(run)
    if not hint and (beside := [p for p in _folders(run.parent) if _holds_readable_run(p)]):
        hint = f"; runs there: {', '.join(map(str, sorted(beside)[:MOST_NAMED]))}{', ...' * (len(beside) > MOST_NAMED)}"
    return f"{flag} {run}: no run with a complete checkpoint there{hint}; {remedy}"


def similar_runs(run: Path) -> str:
    """A hint with the two runs nearest in name: "; perhaps runs/nano was meant". Empty if no name is near."""
    # Only the last names are compared. Whole paths are alike by what they begin with.
    beside = _folders(run.parent)
    names = {p.name: p for p in beside} or {p.name: p / run.name for p in _folders(run.parent.parent)}
    typed = run.name if beside else run.parent.name
    near = [names[name] for name in difflib.get_close_matches(typed, names, n=2 * MOST_NAMED, cutoff=0.65)]
    near = [str(folder) for folder in near if _holds_readable_run(folder)][:2]
    return f"; perhaps {' or '.join(near)} was meant" if near else ""


def _holds_readable_run(run: Path) -> bool:
    try:
        return holds_run(run)
    except UserError:
        return False


def _folders(parent: Path) -> list[Path]:
    try:
        return [p for p in parent.iterdir() if p.is_dir()]
    except OSError:
        return []
