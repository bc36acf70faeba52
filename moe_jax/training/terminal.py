"""The progress of a run on the terminal: a bar where there is one, plain lines elsewhere."""

import math
import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from moe_jax.system.rich_console import Console

SMOOTHING = 0.8
"""Decay per logged step of the running mean of the loss on the terminal. The files hold the unsmoothed loss."""


class Terminal:
    """The progress of a run: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, first: int) -> None:
        self.console = Console()
        self._steps, self._average, self._begin, self._first = steps, math.nan, time.monotonic(), first
        self._bar = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=14),
                TextColumn("{task.description}"),
                console=self.console,
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
        text = (
            f"{_duration(left)} left | {bits:.3f} bits/byte | {record['tokens_per_second']:,.0f} tokens/s | "
            f"loss {self._average:.3f} | {record['drop_fraction']:.1%} dropped | {share_of_rate:.0%} of matmul rate"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        else:
            self.say(f"step {done:>{len(str(self._steps))}}/{self._steps} | {text}")

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
