"""Outputs go where they are told, and no link in a run's folder is followed."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.cli.inspect import Inspect
from moe_jax.config import UserError, load_config
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.inspection.report import report_run
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.doctor import examine
from moe_jax.runs.folder import RunFolder, locked_for_training
from moe_jax.runs.records import read_metrics
from moe_jax.system import environment
from moe_jax.system.files import Folder
from tests.reliability import states

pytestmark = pytest.mark.reliability


# What the user names


def test_commands_leave_a_device_a_device(run: Path, tmp_path: Path, monkeypatch) -> None:
    """A link to /dev/null stands for the device: as root, a rename would replace /dev/null itself."""
    monkeypatch.setattr(environment, "prepare_environment", lambda *_: [])
    monkeypatch.setattr("moe_jax.inspection.report.report_data", lambda *_: {})
    monkeypatch.setattr("moe_jax.inspection.report.render", lambda _: "page")
    monkeypatch.setattr("moe_jax.inspection.report.corpus_routing", lambda *_: None)
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    for outputs in ({"out": str(null)}, {"out": str(tmp_path / "page"), "json": str(null)}):
        assert Inspect(run=str(run), text="Once upon", **outputs).execute() == 0
    assert null.is_symlink()
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


# What lies in the folder of a run


def outside(tmp_path: Path) -> Path:
    """A folder with files of somebody else."""
    there = tmp_path / "outside"
    there.mkdir()
    for name in ("file", "step_00000099.json", "loss.png", "routing.html"):
        (there / name).write_text("theirs\n")
    return there


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


WRITES: dict[str, Callable[[Path], Any]] = {
    ".lock": lambda run: locked_for_training(run).__enter__(),
    "metrics.jsonl": lambda run: RunFolder(run).truncate_logs_after(0, 0),
    "samples.txt": lambda run: RunFolder(run).add_sample(1, "text"),
    "summary.json": lambda run: RunFolder(run).write_summary({}),
    "tokenizer.json": lambda run: RunFolder(run).start(load_config(run), load_tokenizer(run / "tokenizer.json"), []),
    "config.json": lambda run: load_config(run),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_linked_file_is_neither_written_nor_read(name: str, run: Path, tmp_path: Path) -> None:
    there = outside(tmp_path)
    before = content(there)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(there / "file")
    with pytest.raises((OSError, UserError), match="is a link"):
        WRITES[name](run)
    assert content(there) == before


def test_a_linked_folder_is_neither_written_nor_emptied(run: Path, tmp_path: Path) -> None:
    """`traces -> DIR` and a resume deleted files of DIR."""
    there = outside(tmp_path)
    before = content(there)
    for name in ("traces", "report", "nonfinite", "checkpoints"):
        if (run / name).exists():
            shutil.rmtree(run / name)
        (run / name).symlink_to(there)
    folder = RunFolder(run)
    for change in (
        lambda: folder.truncate_logs_after(0, 0),
        lambda: folder.add_trace(99, {}),
        lambda: states.save(CheckpointStore(run), 1),
        lambda: CheckpointStore(run).remove_interrupted_saves(),
        lambda: load_config(run),
        lambda: examine(run, repair=True),
    ):
        with pytest.raises((OSError, UserError), match="is a link"):
            change()
    assert all("is a link" in line for line in report_run(Folder(run)))
    assert content(there) == before


def test_the_folder_itself_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    link = tmp_path / "link"
    assert load_config(link) is not None
    RunFolder(link).add_sample(1, "text")
    assert read_metrics(link) == read_metrics(run)
    with locked_for_training(link):
        pass
