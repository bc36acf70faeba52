"""The files of a run's folder: what a start removes, what a resume records, what the lock says."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.runs.folder import LOCK, RunFolder, locked_for_training
from tests.support import tiny

CONFIG = RunConfig(out="runs/x", resume=True, model=tiny.config())
TOKENIZER = Tokenizer({"kind": "byte"})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "x")


def document(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "config.json").read_text())


def names(folder: RunFolder) -> list[str]:
    return sorted(p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file())


def test_a_start_writes_the_tokenizer_and_the_configuration(folder: RunFolder) -> None:
    folder.start(CONFIG, TOKENIZER, [{"upcycled_from": "runs/dense"}])
    assert names(folder) == ["config.json", "tokenizer.json"]
    written = document(folder)
    assert RunConfig.from_dict(written) == dataclasses.replace(CONFIG, resume=False)
    assert written["history"] == [{"upcycled_from": "runs/dense"}]
    assert {"jax", "flax"} <= set(written["versions"])
    assert json.loads(folder.tokenizer.read_text()) == TOKENIZER.to_dict()


def test_a_start_removes_what_an_earlier_start_has_logged(folder: RunFolder) -> None:
    folder.start(CONFIG, TOKENIZER, [])
    (folder.path / "metrics.jsonl").write_text("{}\n")
    folder.add_sample(1, "text")
    folder.add_trace(1, {"tokens": []})
    folder.write_summary({"steps": 1, "val_loss": float("nan")})
    assert (folder.path / "summary.json").read_text() == '{\n  "steps": 1,\n  "val_loss": null\n}\n'
    (folder.path / "notes.txt").write_text("of the user")
    folder.start(CONFIG, TOKENIZER, [])
    assert names(folder) == ["config.json", "notes.txt", "tokenizer.json"]


def test_a_resume_records_every_setting_that_changed(folder: RunFolder) -> None:
    folder.start(CONFIG, TOKENIZER, [{"first": 1}])
    train = dataclasses.replace(CONFIG.train, steps=9, lr=0.25)
    changed = dataclasses.replace(CONFIG, out="elsewhere", resume=False, preset="story", train=train)
    told = folder.record_resume(CONFIG, changed, 6)
    expected = {"preset": [CONFIG.preset, "story"], "train.steps": [CONFIG.train.steps, 9]}
    expected |= {"train.lr": [CONFIG.train.lr, 0.25]}
    assert sorted(told) == sorted(f"{name} {old} -> {new}" for name, (old, new) in expected.items())
    first, entry = document(folder)["history"]
    assert (first, entry["resumed_at_step"], entry["changed"]) == ({"first": 1}, 6, expected)
    assert folder.record_resume(changed, changed, 7) == []
    assert [entry.get("resumed_at_step") for entry in document(folder)["history"]] == [None, 6, 7]


def test_logs_are_removed_after_a_checkpoint_by_split(tmp_path: Path) -> None:
    """A checkpoint of step 6 that was evaluated at step 4: each limit belongs to its split, and itself is kept."""
    run = RunFolder(tmp_path)
    run.truncate_logs_after(3, 3)
    assert list(tmp_path.iterdir()) == []
    steps = [(step, split) for step in range(1, 9) for split in ("train", "val")]
    lines = [json.dumps({"step": step, "split": split}) for step, split in steps]
    (run.path / "metrics.jsonl").write_bytes("\r\n".join([lines[0], "no record", *lines[1:]]).encode())
    for step in (2, 4, 5, 6):
        run.add_sample(step, f"text {step}\n=== step 7\n")  # a line like a header does not count as one
        run.add_trace(step, {"tokens": [step]})
    run.truncate_logs_after(6, 4)
    kept = [json.loads(line) for line in (run.path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [(r["step"], r["split"]) for r in kept] == [(s, p) for s, p in steps if s <= (6 if p == "train" else 4)]
    assert re.findall(r"^=== step (\d)", run.samples.read_text(), re.MULTILINE) == ["2", "4"]
    assert sorted(p.name for p in (run.path / "traces").iterdir()) == ["step_00000002.json", "step_00000004.json"]
    run.samples.write_bytes(run.samples.read_bytes() + b"=== step 5\n\xc3")  # a crash within a character
    run.truncate_logs_after(6, 4)
    assert run.samples.read_text().endswith("text 4\n === step 7\n\n")


def test_a_second_process_is_told_who_trains(tmp_path: Path) -> None:
    with locked_for_training(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()}\n")
        said = rf"^--out {tmp_path}: process {os.getpid()} is training there; wait for it"
        with pytest.raises(UserError, match=said), locked_for_training(tmp_path):
            pass
        (tmp_path / "config.json").write_text("{}")
    with locked_for_training(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("there", [False, True], ids=["made here", "there before"])
def test_a_start_that_failed_leaves_nothing(tmp_path: Path, there: bool) -> None:
    run = tmp_path / "runs" / "run"
    if there:
        run.mkdir(parents=True)
    with pytest.raises(ValueError, match="the text is too short"), locked_for_training(run):
        raise ValueError("the text is too short")
    assert run.exists() == (tmp_path / "runs").exists() == there
    assert not (run / LOCK).exists()
