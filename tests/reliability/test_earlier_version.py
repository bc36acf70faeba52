"""A run whose checkpoints are of manifest version 3 opens and resumes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

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
