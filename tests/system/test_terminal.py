"""Lines that break at spaces, broken streams, and Ctrl-C that is never lost."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.system.signals import interruptible
from moe_jax.system.terminal import broken, escape_controls

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("one two three", "one two\nthree"),
        ("  one two three", "  one\n  two\n  three"),
        ("inseparable on-off-on", "inseparable\non-off-on"),
        ("", ""),
    ],
)
def test_lines_break_at_spaces(line: str, expected: str) -> None:
    assert broken(line, 8) == expected


PRINTS = """
import os, sys
from moe_jax.system import terminal
terminal.guard_streams()
if sys.argv[1] == "outlives":
    terminal.outlive_output()
file = os.open(os.devnull, os.O_RDONLY)  # must not get the number of a closed stream
print("error", file=sys.stderr)
try:
    print("output")
    sys.stdout.flush()
except terminal.OutputLost as lost:
    os._exit(3 if lost.reader_left else 4)
os._exit(0 if file > 2 else 5)
"""


@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 4), ("2>/dev/full", 0), ("| true", 3)],
)
def test_broken_streams(redirection: str, status: int, tmp_path: Path) -> None:
    """An error on stderr never ends a program; one on stdout does, unless the program outlives its output."""
    for kind in ("ends", "outlives") if status else ("ends",):
        status_file = tmp_path / kind
        program = f'sleep 0.2; "$0" -c "$1" {kind}'
        line = f"({program}; echo $? >{status_file}) {redirection}"
        if "|" not in redirection:
            line = f"({program}) {redirection}; echo $? >{status_file}"
        subprocess.run(["sh", "-c", line, sys.executable, PRINTS], cwd=ROOT, check=False, capture_output=True)
        assert int(status_file.read_text()) == (status if kind == "ends" else 0)


def test_control_characters_are_shown() -> None:
    assert escape_controls("a\x1b[2J\tb\n\x9b") == "a\\x1b[2J\tb\n\\x9b"


@pytest.fixture
def usual() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted:
    """Ctrl-C arrives while Python removes it, as in a callback of the garbage collector."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("usual")
def test_an_interrupt_that_cannot_spread_is_raised_again(capfd: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        Interrupted()
        for _ in range(500):  # a sleep ends before it is raised
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt), interruptible():
        program()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("usual")
def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_shutdown_ends_at_once() -> None:
    code = "import atexit, signal, time; from moe_jax.system.signals import interruptible\n"
    code += "atexit.register(lambda: signal.raise_signal(signal.SIGINT))\n"
    code += "with interruptible(): pass\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
