"""The runs that can be named without a path: those in `runs/`, and the trained models that come with the package.

Standard library only: a wrong name is refused before jax is loaded.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.system.files import read_json, steps_in

RUNS = Path("runs")
SHIPPED = Path(__file__).parents[1] / "models"
"""The models of the package. `benchmarks/ship_models.py` makes them."""
DEFAULT = "stories"
"""The model that commands read where there is no run."""


def holds_run(run: Path) -> bool:
    """Whether a folder holds a complete checkpoint. A checkpoint gets its name only when it is complete."""
    return any(path.is_dir() for path in steps_in(run / "checkpoints").values())


def load_config(run: Path) -> RunConfig | None:
    """The saved configuration of a folder that holds a run, else None. Raises UserError where it cannot be read."""
    if not holds_run(run):
        return None
    try:
        return RunConfig.from_dict(read_json(run / "config.json"))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'config.json'}: cannot be read ({error})") from None


def missing_run(flag: str, run: Path | str, remedy: str = "") -> str:
    """The message for a flag whose folder holds no run, with the names that would do."""
    names = [path.name for path in [*runs_in(RUNS), *runs_in(SHIPPED)]]
    remedy = remedy or f"name a folder, or one of {', '.join(names)}; or make a run with `uv run train.py`"
    return f"{flag} {run}: no run with a complete checkpoint there; {remedy}"


def run_folder(name: str) -> Path:
    """The folder of a run: `name`, else `runs/NAME`, else the model of that name in the package. `name` itself if none
    of them holds a run."""
    places = (Path(name), RUNS / name, SHIPPED / name)
    return next((path for path in places if holds_run(path)), Path(name))


def run_or_default(name: str) -> Path:
    """The same. Without a name, the newest run of `runs/`, else a model of the package: a line on stderr says which."""
    if name:
        return run_folder(name)
    run = next(runs_in(RUNS), SHIPPED / DEFAULT)
    why = "a model that comes with moe-jax" if is_shipped(run) else f"the newest run in {RUNS}"
    print(f"no --run: this is {title(run)}, {why}", file=sys.stderr)
    return run


def runs_in(folder: Path) -> Iterator[Path]:
    """The runs in a folder, the one with the newest checkpoint first."""
    found = []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(UserError):  # a folder that cannot be read
                if holds_run(path):
                    found.append((-saved_at(path), path))
    yield from (path for _, path in sorted(found))


def saved_at(run: Path) -> float:
    """When the run's newest checkpoint was saved, in seconds since 1970."""
    return (run / "checkpoints").stat().st_mtime


def is_shipped(run: Path) -> bool:
    return run.parent == SHIPPED


def title(run: Path) -> str:
    """What a run is called in messages: its path, or the name of a model of the package."""
    return run.name if is_shipped(run) else str(run)
