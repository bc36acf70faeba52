"""The first Ctrl-C or SIGTERM is noted, and said in one line; a second one ends the process at once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.system.signals import HANDLED, Signals

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, time
from moe_jax.system.signals import Signals

with Signals() as signals:
    signal.raise_signal(signal.SIGINT)
    {}
    print(signals.stop_signal)
"""
CASES = {
    "once": ("pass", 0, "2\n"),
    "an echo": ("signal.raise_signal(signal.SIGINT)", 0, "2\n"),
    "twice": ("time.sleep(0.6); signal.raise_signal(signal.SIGTERM)", -signal.SIGTERM, ""),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("when", CASES)
def test_signals(when: str) -> None:
    more, status, printed = CASES[when]
    program = [sys.executable, "-c", PROGRAM.format(more)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout) == (status, printed), ended.stderr
    assert ended.stderr == "SIGINT: stopping after this step is saved; send it again to leave at once\n"


def test_earlier_handlers_apply_again() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    with Signals():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before
