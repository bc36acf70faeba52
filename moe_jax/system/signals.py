"""How a training ends at Ctrl-C or SIGTERM.

`training.loop.evaluate_and_save_if_due` asks `Signals` after each step whether a signal came, saves a checkpoint and
raises `Stopped`. A second signal ends the process at once. While nothing is unsaved, as before the first step, the
first one does so too: nothing is lost then.

Standard library only: the handlers are set before jax is imported.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

HANDLED = (signal.SIGINT, signal.SIGTERM)
DUPLICATE_SIGNAL_SECONDS = 0.5
"""A shell and `uv run` may both forward one Ctrl-C. A signal within this time after the first counts as the same one.
"""


class Stopped(Exception):
    """A signal stopped the run. All that had to be saved has been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Signals:
    """Notes the signal that stops the run. A context manager: after it, the earlier signal handlers apply again.

    With `together`, other processes must stop at the same step, so the first signal never ends or interrupts anything.
    """

    def __init__(self, together: bool = False, saved: bool = False, resume: str = "--resume") -> None:
        self._together, self.resume = together, resume
        """`resume`: the command that goes on with the run."""
        self.saved = saved
        """Whether the run has a checkpoint."""
        self.stop_signal: int | None = None
        """Number of the signal that came; None before one came."""
        self.unsaved = False
        """Whether the process holds steps that are in no checkpoint."""
        self._since = 0.0
        self._raises = False

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def how_to_go_on(self) -> str:
        """What the user can do after the run has stopped."""
        if self.saved:
            return f"go on from the newest checkpoint with {self.resume}"
        return "no step was saved, so the same command starts the run again"

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this context a signal raises Stopped. For work that writes nothing and can be repeated."""
        if self.stop_signal is not None and not self._together:
            raise Stopped(self.stop_signal)
        self._raises = not self._together
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.stop_signal is not None and now - self._since < DUPLICATE_SIGNAL_SECONDS:
            return
        if self.stop_signal is not None or not (self.unsaved or self._together):
            print(f"left at {name}; {self.how_to_go_on}", file=sys.stderr, flush=True)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop_signal, self._since = number, now
        print(f"{name}: stopping after this step is saved; send it again to leave at once", file=sys.stderr, flush=True)
        if self._raises:
            self._raises = False
            raise Stopped(number)
