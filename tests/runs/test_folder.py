"""The lock on a run's folder belongs to one folder, and not to its name."""

import shutil
from pathlib import Path

import pytest

from moe_jax.config import UserError
from moe_jax.runs.folder import LOCK, RunLock


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
