"""The files of a run's folder: what a start removes, what a resume records, what the lock says.

The lock belongs to one folder, and not to its name.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.runs.folder import LOCK, RunFolder, RunLock, locked_for_training
from moe_jax.system import files
from tests.support import tiny

CONFIG = RunConfig(out="runs/x", resume=True, model=tiny.config())
TOKENIZER = Tokenizer({"kind": "byte"}, [bytes([i]) for i in range(256)], list)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "x")


def document(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "config.json").read_text())


def names(folder: RunFolder) -> list[str]:
    return sorted(p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file())


# Paths


def test_the_names_of_the_files(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    paths = (run.metrics, run.samples, run.tokenizer, run.traces)
    assert paths == tuple(tmp_path / n for n in ("metrics.jsonl", "samples.txt", "tokenizer.json", "traces"))


# A start


def test_a_start_writes_the_tokenizer_and_the_configuration(folder: RunFolder) -> None:
    run_id = folder.start(CONFIG, TOKENIZER, [{"upcycled_from": "runs/dense"}])
    assert names(folder) == ["config.json", "tokenizer.json"]
    written = document(folder)
    assert RunConfig.from_dict(written) == dataclasses.replace(CONFIG, resume=False)
    assert (written["run_id"], written["resume"]) == (run_id, False)
    assert written["history"] == [{"upcycled_from": "runs/dense"}]
    assert {"jax", "flax"} <= set(written["versions"])
    assert json.loads(folder.tokenizer.read_text()) == TOKENIZER.to_dict()
    assert (folder.path / "config.json").read_text().startswith('{\n  "')


def test_a_start_removes_what_an_earlier_start_has_logged(folder: RunFolder) -> None:
    folder.start(CONFIG, TOKENIZER, [])
    first = document(folder)["run_id"]
    folder.metrics.write_text("{}\n")
    folder.add_sample(1, "text")
    folder.add_trace(1, {"tokens": []})
    folder.write_summary({"steps": 1})
    (folder.path / "notes.txt").write_text("of the user")
    assert folder.start(CONFIG, TOKENIZER, []) != first
    assert names(folder) == ["config.json", "notes.txt", "tokenizer.json"]


def test_the_guard_is_asked_before_each_change(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("not any more")

    (tmp_path / "metrics.jsonl").write_text("{}\n")
    run = RunFolder(tmp_path, refuse)
    changes = [
        lambda: run.start(CONFIG, TOKENIZER, []),
        lambda: run.save_tokenizer(TOKENIZER),
        lambda: run.write_config(CONFIG, [], "a" * 16),
        lambda: run.truncate_logs_after(0, 0),
        lambda: run.add_sample(1, "text"),
        lambda: run.add_trace(1, {}),
        lambda: run.write_summary({}),
    ]
    for change in changes:
        with pytest.raises(UserError, match="not any more"):
            change()
    assert names(run) == ["metrics.jsonl"]


# A resume


def test_a_resume_records_every_setting_that_changed(folder: RunFolder) -> None:
    run_id = folder.start(CONFIG, TOKENIZER, [{"first": 1}])
    changed = dataclasses.replace(
        CONFIG,
        out="elsewhere",
        resume=False,
        preset="story",
        train=dataclasses.replace(CONFIG.train, steps=9, lr=0.25),
        model=dataclasses.replace(CONFIG.model, dropout=0.5),
    )
    told = folder.record_resume(CONFIG, changed, 6, run_id)
    expected = {
        "preset": [CONFIG.preset, "story"],
        "model.dropout": [CONFIG.model.dropout, 0.5],
        "train.steps": [CONFIG.train.steps, 9],
        "train.lr": [CONFIG.train.lr, 0.25],
    }
    assert sorted(told) == sorted(f"{name} {old} -> {new}" for name, (old, new) in expected.items())
    written = document(folder)
    first, entry = written["history"]
    assert first == {"first": 1}
    assert (entry["resumed_at_step"], entry["changed"]) == (6, expected)
    assert entry["versions"] == written["versions"]
    assert (written["run_id"], written["train"]["steps"]) == (run_id, 9)
    assert folder.record_resume(changed, changed, 7, run_id) == []
    assert [entry.get("resumed_at_step") for entry in document(folder)["history"]] == [None, 6, 7]


@pytest.mark.parametrize("odd", [None, 7, "text", {}])
def test_a_history_that_is_none_is_begun_anew(odd: Any, folder: RunFolder) -> None:
    folder.start(CONFIG, TOKENIZER, [])
    (folder.path / "config.json").write_text(json.dumps(document(folder) | {"history": odd}))
    folder.record_resume(CONFIG, CONFIG, 6, "a" * 16)
    assert [entry["resumed_at_step"] for entry in document(folder)["history"]] == [6]


def test_logs_are_cut_back_by_split(tmp_path: Path) -> None:
    """A checkpoint of step 6 that was evaluated at step 4: each limit belongs to its split, and itself is kept."""
    run = RunFolder(tmp_path)
    records = [(step, split) for step in range(1, 9) for split in ("train", "val")]
    lines = [json.dumps({"step": step, "split": split}) for step, split in records]
    run.metrics.write_bytes("\r\n".join([lines[0], "no record", *lines[1:]]).encode())
    for step in (2, 4, 5, 6):
        run.add_sample(step, f"text {step}")
        run.add_trace(step, {"tokens": [step]})
    run.truncate_logs_after(6, 4)
    kept = [json.loads(line) for line in run.metrics.read_bytes().split(b"\n")[:-1]]
    assert [(r["step"], r["split"]) for r in kept] == [(s, p) for s, p in records if s <= (6 if p == "train" else 4)]
    assert run.samples.read_text() == "=== step 2\ntext 2\n\n=== step 4\ntext 4\n\n"
    assert sorted(p.name for p in run.traces.iterdir()) == ["step_00000002.json", "step_00000004.json"]


def test_cutting_back_makes_no_files(tmp_path: Path) -> None:
    RunFolder(tmp_path).truncate_logs_after(3, 3)
    assert list(tmp_path.iterdir()) == []


def test_samples_of_absurd_size_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.add_sample(1, "text")
    size = run.samples.stat().st_size
    monkeypatch.setattr("moe_jax.runs.folder._MAX_SAMPLES_BYTES", size)
    run.truncate_logs_after(1, 1)
    monkeypatch.setattr("moe_jax.runs.folder._MAX_SAMPLES_BYTES", size - 1)
    with pytest.raises(OSError, match="at most"):
        run.truncate_logs_after(1, 1)


def test_a_snapshot_and_a_summary_are_json(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.add_trace(7, {"tokens": [1, 2]})
    run.write_summary({"steps": 7, "val_loss": float("nan")})
    assert (run.traces / "step_00000007.json").read_text() == '{"step": 7, "tokens": [1, 2]}\n'
    assert (tmp_path / "summary.json").read_text() == '{\n  "steps": 7,\n  "val_loss": null\n}\n'


# The lock


def test_the_lock_says_who_holds_it(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with locked_for_training(run) as lock:
        assert (run / LOCK).read_text() == f"{os.getpid()}\n\n"
        lock.note("b" * 16)
        assert (run / LOCK).read_text() == f"{os.getpid()}\n{'b' * 16}\n"
        lock.check()
    with locked_for_training(run):
        assert (run / LOCK).read_text() == f"{os.getpid()}\n\n"


def test_a_second_process_is_told_who_trains(tmp_path: Path) -> None:
    with locked_for_training(tmp_path):
        said = rf"^--out {tmp_path}: process {os.getpid()} is training there; wait for it"
        with pytest.raises(UserError, match=said), locked_for_training(tmp_path):
            pass
        (tmp_path / LOCK).write_bytes(b"\xff" * 50 + b"\nrest")
        with pytest.raises(UserError, match=r"process \ufffd{20} is"), locked_for_training(tmp_path):
            pass
    with locked_for_training(tmp_path):
        pass


def test_a_lock_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    with locked_for_training(tmp_path):
        (tmp_path / LOCK).write_bytes(b"7\n" + b"x" * 4094)
        with pytest.raises(UserError, match="process 7 is training"), locked_for_training(tmp_path):
            pass
        (tmp_path / LOCK).write_bytes(b"7\n" + b"x" * 4095)
        with pytest.raises(OSError, match=r"4,097 bytes, and at most 4,096"), locked_for_training(tmp_path):
            pass


def test_where_nothing_can_be_locked_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with locked_for_training(tmp_path) as lock:
        lock.note("b" * 16)
        lock.check()
        assert (tmp_path / LOCK).read_text() == ""


def test_a_lock_that_another_process_replaced_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of the file and its lock, the folder was made anew."""
    made = RunLock.__init__

    def replaced(lock: RunLock, run: Path, file: Any) -> None:
        (run / LOCK).rename(run / "old")
        (run / LOCK).write_text("of another process\n")
        made(lock, run, file)

    monkeypatch.setattr(RunLock, "__init__", replaced)
    with pytest.raises(UserError, match="removed or made anew"), locked_for_training(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == "of another process\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    return tmp_path / "run"


def test_a_folder_that_was_made_anew_is_another_folder(run: Path) -> None:
    with (run / LOCK).open("rb+") as file:
        lock = RunLock(run, file)
        lock.check()
        (run / LOCK).rename(run / "old")  # the old file stays, so that the new one has another number
        with pytest.raises(UserError, match="removed or made anew"):
            lock.check()
        (run / LOCK).touch()
        with pytest.raises(UserError, match="removed or made anew"):
            lock.check()


def test_a_folder_that_was_removed_is_noticed(run: Path) -> None:
    with (run / LOCK).open("rb+") as file:
        lock = RunLock(run, file)
        shutil.rmtree(run)
        with pytest.raises(UserError, match="removed or made anew"):
            lock.check()


def test_where_files_cannot_be_locked_the_folder_is_known_all_the_same(run: Path) -> None:
    lock = RunLock(run, None)
    lock.check()
    (run / LOCK).rename(run / "old")
    (run / LOCK).touch()
    with pytest.raises(UserError, match="removed or made anew"):
        lock.check()


@pytest.mark.parametrize("there", [False, True], ids=["made here", "there before"])
def test_a_start_that_failed_leaves_nothing(tmp_path: Path, there: bool) -> None:
    run = tmp_path / "runs" / "run"
    if there:
        run.mkdir(parents=True)
    with pytest.raises(ValueError, match="the text is too short"), locked_for_training(run):
        raise ValueError("the text is too short")
    assert run.exists() == there
    assert (tmp_path / "runs").exists() == there
    assert not (run / ".lock").exists()


def test_a_run_keeps_its_lock(tmp_path: Path) -> None:
    with locked_for_training(tmp_path):
        (tmp_path / "config.json").write_text("{}")
    assert (tmp_path / ".lock").exists()


def test_a_lock_of_another_process_stays(tmp_path: Path) -> None:
    """The folder was removed and made anew by another process, whose lock is alone in it so far."""
    run = tmp_path / "run"
    with locked_for_training(run):
        (run / ".lock").unlink()
        (run / ".lock").write_text("1234\n")
    assert (run / ".lock").read_text() == "1234\n"
