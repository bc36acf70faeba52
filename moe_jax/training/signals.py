"""SIGTERM and SIGINT: the first asks the run to save and stop, the second leaves at once.

Python runs a signal's handler in the main thread, and only when that thread comes back from XLA: not while it
compiles. So a second thread listens as well. It knows at once that a signal came, and ends the process where there is
nothing to save, or where somebody asks a second time. Leaving at once is safe at any moment, since a checkpoint
appears by a rename.

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
ECHO_SECONDS = 0.5
"""A shell and `uv run` may both pass on one Ctrl-C: what comes this soon after the first is the same one."""


class Stopped(Exception):
    """A signal asked the run to stop; what had to be saved is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Signals:
    """Whether a signal asked to stop. A context: outside it signals do what they did before."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """Number of the signal that came; None while there was none."""
        self.unsaved = False
        """Whether the process holds steps that are in no checkpoint: without, the first signal ends it at once."""
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
        """Within, a signal raises Stopped: for work that writes nothing and can be done again."""
        if self.asked is not None:
            raise Stopped(self.asked)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
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
                if first is not None and now - first < ECHO_SECONDS:
                    continue
                if first is not None or not self.unsaved:
                    _leave(data[0])
                first, self.asked = now, data[0]
                name = signal.Signals(data[0]).name
                print(f"{name}: the step is finished and saved; send it again to leave at once", file=sys.stderr)


def _leave(number: int) -> None:
    print(f"left at {signal.Signals(number).name}; go on from the newest checkpoint with --resume", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)
