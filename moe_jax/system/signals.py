"""How a program ends at a signal.

    Signals          training: the first signal saves and stops the run, a second Ctrl-C or SIGTERM ends it at once
    interruptible    every program: Ctrl-C ends it at once
    unwinding        within that: Ctrl-C is an exception, for work that tidies up first, or that goes on

`training.loop.evaluate_and_save_if_due` asks `Signals` after each step whether a signal came, saves a checkpoint and
raises `Stopped`.

Python runs a signal handler in the main thread, and only after XLA has returned to Python. While XLA compiles, no
handler runs. So a second thread is told of a signal at once. It ends the process if there is nothing to save, or if the
user sends a second signal. Ending the process is safe at any time, because a checkpoint gets its name by a rename once
it is complete.

Standard library only: the handlers are set before jax is imported.
"""

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

from moe_jax.system.terminal import show_keys

INSISTENT = (signal.SIGTERM, signal.SIGINT)
"""Signals of a person. The second one means: leave at once."""
_OTHERS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM")
"""A closed terminal, the warnings of a scheduler, the end of the processor time, an alarm. They may come repeatedly."""
HANDLED = (*INSISTENT, *(getattr(signal, name) for name in _OTHERS if hasattr(signal, name)))  # Windows has few
DUPLICATE_SIGNAL_SECONDS = 0.5
"""A shell and `uv run` may both forward one Ctrl-C. A signal within this time after the first counts as the same one.
"""

_SAY_SECONDS = 1.0
"""How long a line may take to be printed."""


class Stopped(Exception):
    """A signal stopped the run. All that had to be saved has been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Signals:
    """Notes the signal that stops the run. A context manager: after it, the earlier signal handlers apply again.

    A signal that was ignored at the start stays ignored, such as SIGHUP under nohup. With `together`, other processes
    must stop at the same step, so the first signal never ends or interrupts anything.
    """

    def __init__(self, together: bool = False, saved: bool = False, resume: str = "--resume") -> None:
        self._together, self.resume = together, resume
        """`resume`: the command that goes on with the run."""
        self.saved = saved
        """Whether the run has a checkpoint."""
        self.stop_signal: int | None = None
        """Number of the signal that came; None before one came."""
        self.unsaved = False
        """Whether the process holds steps that are in no checkpoint. If not, the first signal ends it at once."""
        self._raises = False

    def __enter__(self) -> Self:
        self._listen, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._handle)
            for number in HANDLED
            if number in INSISTENT or signal.getsignal(number) != signal.SIG_IGN
        }
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

    @property
    def how_to_go_on(self) -> str:
        """What the user can do after the run has stopped."""
        if self.saved:
            return f"go on from the newest checkpoint with {self.resume}"
        return "no step was saved, so the same command starts the run again"

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this context a signal raises Stopped. For work that writes nothing and can be repeated."""
        if self._together:
            yield
            return
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = self.stop_signal or number
        if self._raises and not _importing(frame):
            self._raises = False
            raise Stopped(number)

    def _watch(self) -> None:
        first, said = 0.0, False  # `first`: when a person sent the first signal
        with self._listen as listen:
            while data := listen.recv(1):
                number = data[0]
                if number not in self._before:
                    continue
                if not (self.unsaved or self._together):
                    self._leave(number)
                if number in INSISTENT:
                    now = time.monotonic()
                    if first and now - first < DUPLICATE_SIGNAL_SECONDS:
                        continue
                    if first:
                        self._leave(number)
                    first = now
                elif said:
                    continue
                self.stop_signal, said = self.stop_signal or number, True
                again = "send it again to leave" if number in INSISTENT else "SIGTERM leaves"
                _say(f"{signal.Signals(number).name}: stopping after this step is saved; {again} at once")

    def _leave(self, number: int) -> None:
        _end(number, f"left at {signal.Signals(number).name}; {self.how_to_go_on}")


def _say(text: str) -> None:
    """Print a line on stderr, and flush stdout. A stopped terminal, or a full pipe, must not keep the process alive."""

    def say() -> None:
        print(text, file=sys.stderr, flush=True)
        if sys.stdout is not None:
            sys.stdout.flush()

    printing = threading.Thread(target=say, daemon=True)
    printing.start()
    printing.join(_SAY_SECONDS)


def _end(number: int, text: str) -> NoReturn:
    """End the process now, with a line on stderr. On a terminal it takes the place of a progress bar."""
    _say(f"\r\x1b[K\x1b[?25h{text}" if sys.stderr.isatty() else text)
    show_keys()
    os._exit(128 + number)


# Programs that are not training


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context, Ctrl-C ends the process at once, with one line and status 130.

    It raises no KeyboardInterrupt. In the import of an extension module that would become an ImportError or a SIGABRT,
    and orbax waits forever if it comes while arrays are read.

    After the context, Ctrl-C ends the process without a word: Python only shuts down. A program that was started with
    Ctrl-C ignored, as a shell does it in the background, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def unwinding() -> Iterator[None]:
    """Within this context, Ctrl-C raises KeyboardInterrupt in the main thread instead, and is raised again where it was
    lost: an exception cannot spread from a callback of the garbage collector.

    Changes nothing outside `interruptible`, as in a notebook, or where another handler is set, as in training.
    """
    if signal.getsignal(signal.SIGINT) is not _interrupt or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = sys.unraisablehook

    def raise_again() -> None:
        time.sleep(0.05)
        _thread.interrupt_main()

    def hook(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:
            _thread.start_new_thread(raise_again, ())  # does not wait for the thread, so this hook ends before it acts
        else:
            before(lost)

    signal.signal(signal.SIGINT, _raise)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _interrupt)
        if sys.unraisablehook is hook:  # a hook set in the meantime serves threads that still run
            sys.unraisablehook = before


def _interrupt(number: int, frame: FrameType | None) -> None:
    _end(number, "error: interrupted")


def _raise(number: int, frame: FrameType | None) -> None:
    if _importing(frame):
        _interrupt(number, frame)
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    """Whether this frame belongs to an import that has not ended."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
