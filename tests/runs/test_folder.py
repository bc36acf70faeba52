"""The lock on a run's folder belongs to one folder, and not to its name."""

import shutil
from pathlib import Path

import pytest

from moe_jax.config import UserError
from moe_jax.runs.folder import LOCK, RunLock, locked_for_training


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
    run = tmp_path / "run"
    if there:
        run.mkdir()
    with pytest.raises(ValueError, match="the text is too short"), locked_for_training(run):
        raise ValueError("the text is too short")
    assert run.exists() == there
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
