"""Where training writes its numbers: always to metrics.jsonl, and to the tracker that is chosen."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from moe_jax.config import RunConfig, UserError
from moe_jax.parallel.processes import first
from moe_jax.runs import records
from moe_jax.system.files import Folder, json_text
from moe_jax.system.terminal import rich_console


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


# The terminal


SMOOTHING = 0.8
"""Decay per logged step of the running mean of the loss on the terminal. The files hold the unsmoothed loss."""


BAR_WIDTH = 14


class Terminal:
    """The progress of a run: a bar on a terminal, plain lines elsewhere. The bar is gone when it is closed."""

    def __init__(self, steps: int, first: int) -> None:
        self.console = rich_console()
        self._steps, self._average, self._begin, self._first = steps, math.nan, time.monotonic(), first
        self._bar = None
        if self.console.is_terminal:
            # rich shortens the columns that wrap if all do not fit. The step must not be shortened.
            whole = Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}", table_column=whole),
                BarColumn(bar_width=BAR_WIDTH),
                TextColumn("{task.description}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("compiling the training step", total=steps, completed=first)
            self._bar.start()

    def step(self, record: dict[str, Any], bytes_per_token: float, share_of_rate: float) -> None:
        """Show a record of the training split: on the bar, or as a line.

        `share_of_rate` is the arithmetic per second, relative to the rate of one matrix product measured at the start.
        It is no share of a peak: on a machine with other work, the measured rate may be below what training reaches.
        """
        loss = record["loss"]
        if not math.isfinite(self._average):  # no earlier loss was finite
            self._average = loss
        elif math.isfinite(loss):
            self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss
        bits = self._average / math.log(2) / bytes_per_token
        done = record["step"]
        left = (self._steps - done) * (time.monotonic() - self._begin) / max(done - self._first, 1)
        facts = [
            f"{_duration(left)} left",
            f"{bits:.3f} bits/byte",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"loss {self._average:.3f}",
            f"{record['drop_fraction']:.1%} dropped",
            f"{share_of_rate:.0%} of matmul rate",
        ]
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self._beside_the_bar(facts))
        else:
            self.say(" | ".join([f"step {done:>{len(str(self._steps))}}/{self._steps}", *facts]))

    def _beside_the_bar(self, facts: list[str]) -> str:
        """As many facts, from the first, as the width of the terminal has room for."""
        room = self.console.width - (2 * len(str(self._steps)) + 1) - BAR_WIDTH - 2
        return next(text for n in range(len(facts), 0, -1) if len(text := " | ".join(facts[:n])) <= room or n == 1)

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
