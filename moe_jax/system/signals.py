"""How a training ends at Ctrl-C or SIGTERM: the first one saves and stops it, a second one ends the process at once.

`training.run.evaluate_and_save_if_due` asks after each step whether a signal came. Standard library only.
"""

import signal
import sys
import time
from types import FrameType
from typing import Any, Self

HANDLED = (signal.SIGINT, signal.SIGTERM)
DUPLICATE_SIGNAL_SECONDS = 0.5
"""A shell and `uv run` may both forward one Ctrl-C. A signal within this time after the first counts as the same one.
"""


class Signals:
    """Notes the signal that stops the run. A context manager: after it, the earlier signal handlers apply again."""

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        """Number of the signal that came; None before one came."""
        self._since = 0.0

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop_signal is None:
            self.stop_signal, self._since = number, now
            said = f"{signal.Signals(number).name}: stopping after this step is saved; send it again to leave at once"
            print(said, file=sys.stderr, flush=True)
        elif now - self._since >= DUPLICATE_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
