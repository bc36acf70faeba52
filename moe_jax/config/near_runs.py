"""What to say of a folder that holds no run: its name may be mistyped, so the runs nearby are named."""

import difflib
from pathlib import Path

from moe_jax.config.run import holds_run
from moe_jax.system.errors import UserError

MOST_NAMED = 4
"""Runs that a message lists where no name is near."""


def missing_run(flag: str, run: Path | str, remedy: str = "make one with `uv run train.py`") -> str:
    """The message for a flag whose folder holds no run. Names the runs with a similar name, else those beside it."""
    run = Path(run)
    hint = perhaps_another(run)
    if not hint and (beside := [p for p in _folders(run.parent) if _holds_readable_run(p)]):
        hint = f"; runs there: {', '.join(map(str, sorted(beside)[:MOST_NAMED]))}{', ...' * (len(beside) > MOST_NAMED)}"
    return f"{flag} {run}: no run with a complete checkpoint there{hint}; {remedy}"


def perhaps_another(run: Path) -> str:
    """A hint with the two runs nearest in name: "; perhaps runs/nano was meant". Empty if no name is near."""
    # Only the last names are compared. Whole paths are alike by what they begin with.
    beside = _folders(run.parent)
    called = {p.name: p for p in beside} or {p.name: p / run.name for p in _folders(run.parent.parent)}
    typed = run.name if beside else run.parent.name
    near = [called[name] for name in difflib.get_close_matches(typed, called, n=2 * MOST_NAMED, cutoff=0.65)]
    near = [str(found) for found in near if _holds_readable_run(found)][:2]
    return f"; perhaps {' or '.join(near)} was meant" if near else ""


def _holds_readable_run(run: Path) -> bool:
    try:
        return holds_run(run)
    except UserError:  # it cannot be read, and nobody asked for it
        return False


def _folders(parent: Path) -> list[Path]:
    try:
        return [p for p in parent.iterdir() if p.is_dir()]
    except OSError:
        return []
