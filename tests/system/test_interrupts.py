"""Ctrl-C in a program is never lost, and ends its shutdown without a traceback."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from moe_jax.system.interrupts import interruptible


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted:
    """Ctrl-C arrives while Python removes it."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_that_cannot_spread_is_raised_again(capfd: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        Interrupted()
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt), interruptible():
        program()
    assert "Traceback" not in capfd.readouterr().err


def test_other_lost_exceptions_are_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    class Wrong:
        def __del__(self) -> None:
            raise ValueError("wrong")

    with interruptible():
        Wrong()
    assert [lost.exc_type for lost in seen] == [ValueError]


def test_a_hook_that_the_program_sets_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may fail after the program's end (`runs/arrays.py`)."""
    usual, own = [], []
    monkeypatch.setattr(sys, "unraisablehook", before := usual.append)
    with interruptible():
        pass
    assert sys.unraisablehook is before
    with interruptible():
        sys.unraisablehook = own.append
    sys.unraisablehook("lost")  # pyright: ignore[reportArgumentType]
    assert (usual, own) == ([], ["lost"])


def test_the_shutdown_ends_at_once() -> None:
    code = "import atexit, signal, time; from moe_jax.system.interrupts import interruptible\n"
    code += "atexit.register(lambda: signal.raise_signal(signal.SIGINT))\n"
    code += "with interruptible(): pass\n"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (-signal.SIGINT, "")


def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
