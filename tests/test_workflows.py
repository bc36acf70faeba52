"""The workflows: every line that they run is run here, in their order, or by `.ci/run` itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CI = [line.removeprefix("env -u MOE_JAX_SHARED ") for line in (ROOT / ".ci" / "run").read_text().splitlines()]


def lines(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.package
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_line_of_a_workflow_runs(workflow: Path, tmp_path: Path) -> None:
    assert lines(workflow)
    environment = os.environ | {"UV_NO_SYNC": "1", "UV_PROJECT": str(ROOT), "UV_PROJECT_ENVIRONMENT": sys.prefix}
    for line in [line for line in lines(workflow) if line not in CI]:
        (tmp_path / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8"), encoding="utf-8")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), line
