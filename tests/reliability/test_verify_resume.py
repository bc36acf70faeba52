"""`benchmarks/verify_resume.py`: it passes wherever it kills."""

import random
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
