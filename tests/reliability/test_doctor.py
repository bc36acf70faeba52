"""`python -m moe_jax doctor`: what it finds in a folder that was mistreated, and what it mends."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import load_config
from moe_jax.runs.checkpoint import CheckpointStore, verify
from moe_jax.runs.doctor import Finding, examine
from tests.reliability import runs, states

pytestmark = pytest.mark.reliability


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def arrays(run: Path, step: int) -> Path:
    return max(states.files(run / "checkpoints" / f"step_{step:08d}" / "arrays"), key=lambda p: p.stat().st_size)


ILLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # what happens to the folder, and the subject of the finding
    "arrays": (lambda run: flip(arrays(run, 12)), "step_00000012"),
    "manifest": (lambda run: flip(run / "checkpoints/step_00000010/manifest.json"), "step_00000010"),
    "weights": (
        lambda run: flip(run / "checkpoints/step_00000012/weights.safetensors"),
        "step_00000012/weights.safetensors",
    ),
    "left over": (lambda run: (run / "checkpoints/tmp_00000014_1").mkdir(), "tmp_00000014_1"),
    "config gone": (lambda run: (run / "config.json").unlink(), "config.json"),
    "config cut": (lambda run: (run / "config.json").write_text('{"schema'), "config.json"),
    "tokenizer gone": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json"),
    "metrics cut": (lambda run: (run / "metrics.jsonl").open("a").write('{"step": 3'), "metrics.jsonl"),
}


@pytest.mark.parametrize("ill", ILLS)
def test_what_is_found_and_mended(
    ill: str, whole: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(cache))
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    harm, subject = ILLS[ill]
    harm(run)
    before = {p: p.read_bytes() for p in states.files(run)}
    found = {f.what: f for f in examine(run, repair=False)}
    assert any(f.state == "damaged" for f in found.values())
    assert {p: p.read_bytes() for p in states.files(run)} == before, "looking changed something"
    mended = {f.what: f for f in examine(run, repair=True)}
    assert mended[subject].state == "repaired"
    assert all(f.state == "good" for f in examine(run, repair=False))
    newest = CheckpointStore(run).newest()
    assert newest is not None
    assert verify(newest) is None
    assert load_config(run) is not None


def test_a_good_run_is_left_alone(whole: tuple[Path, dict[str, Any]]) -> None:
    before = {p: p.read_bytes() for p in states.files(whole[0])}
    findings = examine(whole[0], repair=True)
    assert {f.state for f in findings} == {"good"}
    assert [f.what for f in findings][-3:] == ["config.json", "tokenizer.json", "metrics.jsonl"]
    assert {p: p.read_bytes() for p in states.files(whole[0])} == before


def test_where_nothing_is_good_nothing_is_renamed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        flip(states.save(store, step) / "manifest.json")
    findings = examine(tmp_path, repair=True)
    assert [f for f in findings if f.what.startswith("step_")] == [
        Finding(f"step_0000000{step}", "damaged", "its manifest was changed") for step in (1, 2)
    ]
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_00000001", "step_00000002"]


def test_the_command(whole: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    flip(arrays(run, 12))
    command = ["doctor", "--run", str(run)]
    ill = runs.complete(command, cache, runs.COMMANDS)
    assert (ill.returncode, ill.stderr) == (1, "")
    assert next(line.split()[:2] for line in ill.stdout.splitlines() if "damaged" in line) == [
        "step_00000012",
        "damaged",
    ]
    mended = runs.complete([*command, "--repair"], cache, runs.COMMANDS)
    assert mended.returncode == 0
    assert "now called damaged_00000012" in mended.stdout
