"""What happens at Ctrl-C (SIGINT) and SIGTERM: the first signal saves and stops the run, a second ends it at once.

`Signals` notes that a signal came. `training.loop.evaluate_and_save_if_due` reads that after each step, saves a
checkpoint and raises `Stopped`.

Python runs a signal handler in the main thread, and only after XLA has returned to Python. While XLA compiles, no
handler runs. So a second thread listens too, and is told of a signal at once. It ends the process if there is nothing
to save, or if the user sends a second signal. Ending the process is safe at any time, because a checkpoint gets its
name by a rename once it is complete.

Standard library only: the handlers are set before jax is imported.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

HANDLED = (signal.SIGTERM, signal.SIGINT)
DUPLICATE_SIGNAL_SECONDS = 0.5
"""A shell and `uv run` may both forward one Ctrl-C. A signal within this time after the first counts as the same one.
"""


class Stopped(Exception):
    """A signal asked the run to stop. All that had to be saved has been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Signals:
    """Notes whether a signal asked to stop. A context manager: after it, the earlier signal handlers apply again."""

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        """Number of the signal that came; None before one came."""
        self.unsaved = False
        """Whether the process holds steps that are in no checkpoint. If not, the first signal ends it at once."""
        self._raises = False

    def __enter__(self) -> Self:
        self._listen, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in HANDLED}
        self._fd_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        with suppress(OSError):
            self._wake.shutdown(socket.SHUT_RDWR)  # ends the thread, which closes its own end
        self._wake.close()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this context a signal raises Stopped. For work that writes nothing and can be repeated."""
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = self.stop_signal or number
        if self._raises:
            self._raises = False
            raise Stopped(number)

    def _watch(self) -> None:
        first: float | None = None
        with self._listen as listen:
            while data := listen.recv(1):
                if data[0] not in HANDLED:
                    continue
                now = time.monotonic()
                if first is not None and now - first < DUPLICATE_SIGNAL_SECONDS:
                    continue
                if first is not None or not self.unsaved:
                    _leave(data[0])
                first, self.stop_signal = now, data[0]
                name = signal.Signals(data[0]).name
                print(f"{name}: stopping after this step is saved; send it again to leave at once", file=sys.stderr)


def _leave(number: int) -> None:
    print(f"left at {signal.Signals(number).name}; go on from the newest checkpoint with --resume", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)
