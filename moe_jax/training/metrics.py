"""Where numbers go while training: metrics.jsonl always, TensorBoard and W&B where asked for, and the terminal."""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from moe_jax.config import RunConfig

SMOOTHING = 0.8
"""Decay of the average loss on the terminal, a logged step. The files hold what was measured."""
_TAIL_BYTES = 2**15


class MetricsLog:
    """Appends records to metrics.jsonl, and mirrors their numbers to the trackers that are on."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(path.parent) if config.tensorboard else None
        self._wandb = _wandb(path.parent, config) if config.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """One line, on the disk at once: a killed run keeps what it measured."""
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(f"{record['split']}/{name}", value, record["step"])
            for layer, load in enumerate(record.get("load", [])):
                add_load(self._tensorboard, f"load/layer_{layer}", load, record["step"])
        if self._wandb is not None:
            self._wandb.log({f"{record['split']}/{k}": v for k, v in numbers.items()}, step=record["step"])

    def sync(self) -> None:
        """On the medium: a checkpoint must not outlive the records before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def add_load(writer: Any, name: str, load: list[float], step: int) -> None:
    """The experts' shares of a layer as a histogram whose bars are the experts: expert e lies between e and e + 1."""
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


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(folder: Path) -> Any:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]  # `cli.check_run` looks for it

    return SummaryWriter(str(folder / "tensorboard"))


def _wandb(folder: Path, config: RunConfig) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]  # `cli.check_run` looks for it

    # One id a folder, so that a resumed run goes on with its curves.
    name = f"{folder.name}-{folder.stat().st_ino}"
    return wandb.init(project="moe-jax", id=name, resume="allow", dir=str(folder), config=dataclasses.asdict(config))


def last_train_record(metrics: Path) -> dict[str, Any]:
    """The newest record of the training split in a metrics.jsonl; empty where there is none.

    Reads from the end, so that an evaluation takes no more time and memory the longer the run.
    """
    if not metrics.exists():
        return {}
    with metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = min(_TAIL_BYTES, size)
        while True:
            file.seek(size - tail)
            lines = file.read(tail).splitlines()
            for line in reversed(lines if tail == size else lines[1:]):  # the first may be cut
                record = json.loads(line)
                if record["split"] == "train":
                    return record
            if tail == size:
                return {}
            tail = min(4 * tail, size)


class Terminal:
    """The progress of a run: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, first: int) -> None:
        self.console = Console(file=sys.stdout, highlight=False)
        self._steps, self._average, self._begin, self._first = steps, math.nan, time.monotonic(), first
        self._bar = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._bar.add_task("compiling the training step", total=steps, completed=first)
            self._bar.start()

    def step(self, record: dict[str, Any], bytes_per_token: float, share_of_peak: float) -> None:
        """Show a record of the training split: every step on a bar, the logged ones as lines."""
        loss = record["loss"]
        if not math.isfinite(self._average):  # this is the first, or all before it were not finite
            self._average = loss
        elif math.isfinite(loss):
            self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss
        bits = self._average / math.log(2) / bytes_per_token
        done = record["step"]
        left = (self._steps - done) * (time.monotonic() - self._begin) / max(done - self._first, 1)
        text = (
            f"loss {self._average:.3f} | {bits:.3f} bits/byte | {record['tokens_per_second']:,.0f} tokens/s | "
            f"{share_of_peak:.0%} of peak | {record['drop_fraction']:.1%} dropped | {_duration(left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        else:
            self.say(f"step {done:>{len(str(self._steps))}}/{self._steps} | {text}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
