"""`serve` in a process of its own: clients that go, signals, a port in use."""

import json
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from tests.reliability import runs
from tests.reliability.served import Served, start

pytestmark = pytest.mark.reliability


def cancelled(served: Served) -> int:
    """Texts that the server gave up because their clients had left."""
    return served.ask("/health")["cancelled"]


def test_clients_that_vanish_leave_no_slot_behind(served: Served) -> None:
    """Their texts are cancelled. A text that ends by itself would free its slot too."""
    rng, cancelled_before = random.Random(1), cancelled(served)
    before = len(os.listdir(f"/proc/{served.process.pid}/fd")) if Path("/proc").exists() else 0
    for _ in range(60):
        sock = served.open(prompt="the", max_tokens=4000, stream=rng.random() < 0.5, temperature=1.5)
        time.sleep(rng.random() * 0.02)
        if rng.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
            time.sleep(0.01)
        sock.close()
    end = time.monotonic() + 30
    while not served.free():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert cancelled(served) > cancelled_before
    if before:
        assert len(os.listdir(f"/proc/{served.process.pid}/fd")) <= before + 3


def test_a_port_in_use_is_one_line(served: Served, commands: runs.Commands) -> None:
    port = str(served.port)
    finished = commands.run(["-m", "moe_jax", "serve", "--run", str(served.run), "--port", port], served.run)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert f"error: --host 127.0.0.1 --port {port}: [Errno 98] Address already in use; give" in finished.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_with_a_last_event(
    number: signal.Signals, whole: tuple[Path, dict[str, Any]], cache: Path
) -> None:
    server = start(whole[0], cache, "--slots", "2")
    streams = [server.open(prompt="the", max_tokens=4096, stream=True, temperature=1.5, n=4) for _ in range(2)]
    for sock in streams:
        assert sock.recv(12) == b"HTTP/1.1 200"
    server.process.send_signal(number)
    told = [b"".join(iter(lambda s=sock: s.recv(1 << 16), b"")).decode() for sock in streams]
    for text in told:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "stopping"
    assert server.process.wait(30) == 0
    assert server.process.stdout is not None
    assert server.process.stderr is not None
    assert (server.process.stdout.read(), server.process.stderr.read()) == ("stopped\n", "")
