"""`benchmarks/verify_resume.py`: it passes at its earliest kill, and leaves nothing behind when it is stopped."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from verify_resume import verify_resume

from tests.reliability import runs
from tests.support.commands import train_settings

pytestmark = pytest.mark.reliability


@pytest.mark.parametrize("kill", [min, pytest.param(max, marks=pytest.mark.slow)], ids=["first", "last"])
def test_it_passes_wherever_it_kills(
    kill: Callable[[range], int],
    text: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first and the last step that can be drawn: there is a checkpoint to resume, and every bit is equal."""
    for name, value in runs.environment(cache).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(random, "randrange", lambda low, high: kill(range(low, high)))
    config, _ = train_settings(*runs.flags(text, tmp_path / "unused"))
    assert verify_resume(config) == 0
    printed = capsys.readouterr().out
    assert "PASS" in printed
    assert "from step None" not in printed


def alive(process: int) -> bool:
    """Whether a process is there and not merely waiting to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_leaves_nothing_behind(
    number: int, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its first run trains: that process is ended, and the scratch folder removed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = runs.start(runs.flags(text, tmp_path / "unused"), cache, runs.VERIFY_RESUME)
    while process.poll() is None and not (locks := [p for p in tmp_path.glob("*/whole/.lock") if p.read_text()]):
        time.sleep(0.01)
    child = int(locks[0].read_text().split()[0])
    assert alive(child)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert not alive(child)
    assert os.listdir(tmp_path) == []
