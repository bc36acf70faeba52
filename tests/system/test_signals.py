"""The first signal is noted; the second ends the process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, time
from moe_jax.system.signals import Signals

with Signals() as signals:
    {}
print(signals.stop_signal)
"""
SEND = "signal.raise_signal({})"
CASES = {
    "one": ([SEND.format(2)], 0, "2\n"),
    "twice": ([SEND.format(2), "time.sleep(0.6)", SEND.format(15)], -15, ""),
    "an echo": ([SEND.format(15), SEND.format(15)], 0, "15\n"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("when", CASES)
def test_signals(when: str) -> None:
    lines, status, printed = CASES[when]
    program = PROGRAM.format("; ".join(lines))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (status, printed), ended.stderr
    (said,) = ended.stderr.splitlines()
    assert said.endswith(": stopping after this step is saved; send it again to leave at once")


def test_earlier_handlers_apply_again() -> None:
    from moe_jax.system.signals import HANDLED, Signals

    before = [signal.getsignal(number) for number in HANDLED]
    with Signals():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before
