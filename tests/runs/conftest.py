"""A saved run for the tests of this folder. It is made once, without training."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import saved_run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run with one checkpoint, of step `saved_run.STEP`. To be read only."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_JAX_CACHE", str(folder / "cache"))
        yield saved_run.save_run(folder)


@pytest.fixture
def copied(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the saved run, which a test may change."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(saved.parent / "cache"))
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"
