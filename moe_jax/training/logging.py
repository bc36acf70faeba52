"""Where training writes its numbers: always to metrics.jsonl, and to the tracker that is chosen."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.config import RunConfig, UserError
from moe_jax.parallel.processes import first
from moe_jax.runs import records
from moe_jax.system.files import Folder, json_text


class MetricsLog:
    """Appends records to metrics.jsonl, and copies their numbers to the tracker (`--track`). Only the first of several
    processes does so."""

    def __init__(self, run: Folder, config: RunConfig) -> None:
        self._file = run.append(records.METRICS)
        self._tensorboard = _tensorboard(run) if config.track == "tensorboard" and first() else None
        starts = {"wandb": _wandb, "trackio": _trackio}
        start = starts.get(config.track) if first() else None
        self._tracker = start and _started(config.track, start, run, config)

    def write(self, record: dict[str, Any]) -> None:
        """Write one line, and flush it, so that a killed run keeps its records."""
        self._file.write(json_text(record).encode() + b"\n")
        self._file.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(f"{record['split']}/{name}", value, record["step"])
            for layer, load in enumerate(record.get("load", [])):
                add_load(self._tensorboard, f"load/layer_{layer}", load, record["step"])
        if self._tracker is not None:
            self._tracker.log({f"{record['split']}/{k}": v for k, v in numbers.items()}, step=record["step"])

    def sync(self) -> None:
        """Wait until all records are on the disk. After a power loss, no checkpoint is then newer than its records."""
        if first():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._tracker is not None:
            self._tracker.finish()


def add_load(writer: Any, name: str, load: list[float], step: int) -> None:
    """Write the load of a layer's experts as a histogram. The bar from e to e + 1 is the share of expert e."""
    experts = range(len(load))
    writer.add_histogram_raw(
        tag=name,
        min=0.0,
        max=float(len(load)),
        num=sum(load),
        sum=sum((e + 0.5) * share for e, share in zip(experts, load, strict=True)),
        sum_squares=sum((e + 0.5) ** 2 * share for e, share in zip(experts, load, strict=True)),
        bucket_limits=[float(e + 1) for e in experts],
        bucket_counts=load,
        global_step=step,
    )


def _tensorboard(run: Folder) -> Any:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]  # the command line has looked for it

    return SummaryWriter(str(run.make("tensorboard")))


def _started(name: str, start: Callable[[Folder, RunConfig], Any], run: Folder, config: RunConfig) -> Any:
    """A tracker. Raises UserError if it cannot be started: without a key or a network, for example."""
    try:
        return start(run, config)
    except Exception as error:  # each package has errors of its own kinds
        said = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"--track {name}: cannot be started ({said}); fix that, or leave the flag out") from error


def _wandb(run: Folder, config: RunConfig) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]  # the command line has looked for it

    run.make("wandb")
    folder = run.path
    name = _name(folder)
    return wandb.init(project="moe-jax", id=name, resume="allow", dir=str(folder), config=_settings(config))


def _trackio(run: Folder, config: RunConfig) -> Any:
    """A run in trackio's own database on this machine: its folder is TRACKIO_DIR, or else in the user's cache."""
    import trackio  # pyright: ignore[reportMissingImports]  # the command line has looked for it

    settings = _settings(config)
    return trackio.init(project="moe-jax", name=_name(run.path), resume="allow", config=settings, embed=False)


def _settings(config: RunConfig) -> dict[str, Any]:
    """section.name -> value, of every setting."""
    return {f"{section}.{name}".lstrip("."): value for section, name, value in config.settings()}


def _name(folder: Path) -> str:
    """One name for each folder, so that a resumed run continues its curves."""
    return f"{folder.name}-{folder.stat().st_ino}"
