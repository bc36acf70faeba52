"""The first signal is noted while steps are unsaved; the second ends the process. Without such steps the first does."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, sys, time
from moe_jax.system.signals import Signals, Stopped

def send(number):
    signal.raise_signal(number)

with Signals(resume="`again`") as signals:
{}
print("end")
"""
CASES = {
    "nothing unsaved": (["send(15)"], -15, "", "left at SIGTERM; no step was saved, so the same command starts"),
    "unsaved": (["signals.unsaved = True", "send(2)", "print(signals.stop_signal)"], 0, "2\nend\n", "SIGINT: stopping"),
    "twice": (
        ["signals.unsaved = signals.saved = True", "send(2)", "time.sleep(0.6)", "send(15)"],
        -15,
        "",
        "left at SIGTERM; go on from the newest checkpoint with `again`",
    ),
    "an echo": (["signals.unsaved = True", "send(2)", "send(2)"], 0, "end\n", "SIGINT: stopping"),
    "in work that can be repeated": (
        [
            "signals.unsaved = True",
            "try:",
            "    with signals.interruptible(): send(15)",
            "except Stopped as stop: print(stop.status)",
        ],
        0,
        "143\nend\n",
        "SIGTERM: stopping",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("when", CASES)
def test_signals(when: str) -> None:
    lines, status, printed, said = CASES[when]
    program = PROGRAM.format("\n".join(f"    {line}" for line in lines))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (status, printed), ended.stderr
    assert said in ended.stderr.splitlines()[-1]
    assert len(ended.stderr.splitlines()) == (2 if when == "twice" else 1)


def test_earlier_handlers_apply_again() -> None:
    from moe_jax.system.signals import HANDLED, Signals

    before = [signal.getsignal(number) for number in HANDLED]
    with Signals():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before
