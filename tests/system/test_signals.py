"""A signal ends a process that has nothing to save, also where nobody reads what it prints."""

import signal
import subprocess
import sys

import pytest

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
