"""The progress of a run on the terminal: a bar where there is one, plain lines elsewhere."""

import math
import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from moe_jax.system.terminal import rich_console

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
