"""One run, one process, one folder: locks, settings that do not fit, and nothing written anywhere else."""

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


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_nothing_is_written_outside_the_run_and_the_caches(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HOME, the working folder and the folder of temporary files stay as they were."""
    for name in ("home", "cache", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    before = tree(text.parent)
    finished = runs.complete(runs.flags(text, tmp_path / "run"), tmp_path / "cache")
    assert finished.returncode == 0, finished.stderr
    outside = tree(tmp_path / "home") | tree(tmp_path / "tmp") | (tree(text.parent) - before)
    assert outside == set()
    assert {p.name for p in tmp_path.iterdir()} == {"home", "cache", "tmp", "run"}
