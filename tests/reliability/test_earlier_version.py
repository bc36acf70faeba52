"""A run whose checkpoints are of manifest version 3 opens and resumes; older ones are refused in one line."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import UserError
from moe_jax.runs import manifest
from moe_jax.runs.load import open_run
from tests.reliability import runs
from tests.support import saved_run

pytestmark = pytest.mark.reliability


def test_a_run_of_version_3_goes_on_with_the_same_bits(
    text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The run that nobody interrupted, without its last checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    for path in (out / "checkpoints").iterdir():
        saved_run.as_version_3(saved_run.Checkpoint.read(path))
    assert open_run(out).checkpoint.manifest["version"] == 3
    resumed = runs.complete([*runs.flags(text, out), "--resume"], cache)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.result(out) == whole[1]


def test_an_older_run_is_refused_in_one_line(run: Path) -> None:
    folder = run / "checkpoints" / saved_run.NAME
    manifest.write(folder, manifest.read(folder) | {"version": 2})
    with pytest.raises(UserError, match=r"every checkpoint is damaged|of version 2, this program reads 4"):
        open_run(run)


def test_the_layout_is_that_of_every_run(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A copy is a run, wherever it lies."""
    shutil.copytree(whole[0], tmp_path / "copy")
    newest = saved_run.newest(tmp_path / "copy")
    assert newest.path.name == "step_00000012"
    names = {path.name for path in newest.path.iterdir()}
    assert names == {"_CHECKPOINT_METADATA", "arrays", "manifest.json", "weights.safetensors"}
