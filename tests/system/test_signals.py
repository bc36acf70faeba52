"""A signal ends a process that has nothing to save, also where nobody reads what it prints. Ctrl-C is never lost, and
never shown as a traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FULL = """
import os, time
from moe_jax.system.signals import Signals

os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x")  # until the pipe is full
except BlockingIOError:
    os.set_blocking(2, True)
with Signals():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_full_pipe_does_not_keep_the_process_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", FULL], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 128 + signal.SIGTERM
        finally:
            process.kill()


PROGRAM = """
import signal, sys, time
from moe_jax.system.signals import interruptible, unwinding

def tidying(work):
    try:
        work()
    except KeyboardInterrupt:
        print("tidied")

def ctrl_c():
    signal.raise_signal(signal.SIGINT)

def importing():
    import interrupts_itself

class Removed:
    def __del__(self):  # as in a callback of the garbage collector
        raise KeyboardInterrupt

def losing():
    Removed()
    for _ in range(500):  # a long sleep would not be interrupted
        time.sleep(0.01)

"""
INTERRUPTED = (130, "", "error: interrupted\n")
INTERRUPTS = {
    "at work": ("with interruptible(): ctrl_c()", INTERRUPTED),
    "in an import": ("with interruptible(): importing()", INTERRUPTED),
    "before it tidies": ("with interruptible(), unwinding(): tidying(ctrl_c)", (0, "tidied\n", "")),
    "after it has tidied": ("with interruptible():\n with unwinding(): tidying(int)\n ctrl_c()", INTERRUPTED),
    "in an import, before it tidies": ("with interruptible(), unwinding(): tidying(importing)", INTERRUPTED),
    "where it cannot spread": ("with interruptible(), unwinding(): tidying(losing)", (0, "tidied\n", "")),
    "ignored": ("signal.signal(2, signal.SIG_IGN)\nwith interruptible(), unwinding(): ctrl_c()", (0, "", "")),
    "at the end": ("import atexit; atexit.register(ctrl_c)\nwith interruptible(): pass", (-2, "", "")),
    "with another handler": (
        "with interruptible():\n signal.signal(2, lambda *_: print('own'))\n with unwinding(): ctrl_c()",
        (0, "own\n", ""),
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("when", INTERRUPTS)
def test_an_interrupt(when: str, tmp_path: Path) -> None:
    code, expected = INTERRUPTS[when]
    (tmp_path / "interrupts_itself.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    program = f"import sys; sys.path.append({str(tmp_path)!r})\n{PROGRAM}{code}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == expected


def test_the_package_imports_nothing() -> None:
    """`python -m moe_jax` imports it before `__main__` can listen. Ctrl-C in such an import prints a traceback."""
    code = "import sys; before = {*sys.modules}; import moe_jax; print({*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "{'moe_jax'}\n"
