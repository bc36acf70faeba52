"""One run, one process, one folder: the lock."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs

pytestmark = pytest.mark.reliability


def test_two_processes_on_one_folder_and_a_killed_one(
    text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The second is told who trains there, and the first does not notice. A killed process leaves no lock."""
    out = tmp_path / "run"
    first = runs.start(runs.flags(text, out), cache)
    while not (out / ".lock").exists() or not (out / ".lock").read_text().strip():
        time.sleep(0.01)
    second = runs.complete(runs.flags(text, out), cache)
    assert second.returncode == 1, second.stderr
    assert second.stderr == (
        f"error: --out {out}: process {first.pid} is training there; wait for it, or name another folder\n"
    )
    while first.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    first.kill()
    first.communicate()
    resumed = runs.complete([*runs.flags(text, out), "--resume"], cache)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.result(out) == whole[1]
