"""A first step that runs out of memory costs a rung of the ladder, and not the run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reliability import runs

pytestmark = pytest.mark.reliability
SMALL_DEVICE = "tests/reliability/small_device.py"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def chosen(run: Path) -> dict[str, Any]:
    document = json.loads((run / "config.json").read_text())
    names = {"train": ("batch_size", "grad_accum"), "execution": ("remat",)}
    return {name: document[section][name] for section, fields in names.items() for name in fields}


def test_a_first_step_without_memory_takes_the_next_settings(text: Path, tmp_path: Path) -> None:
    """4 x 2 sequences fail, and so does remat with them. The arrays of a try are gone before the next ones are made. A
    resumed run does the same, and the losses are those of the run that was asked for, to rounding."""
    for further in (
        [*runs.flags(text, tmp_path / "whole", steps=6)],
        [*runs.flags(text, tmp_path / "whole"), "--resume"],
    ):
        whole = runs.complete(further, tmp_path)
        assert whole.returncode == 0, whole.stderr
    first = runs.complete(["2", *runs.flags(text, tmp_path / "run", steps=6)], tmp_path, SMALL_DEVICE)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("the first step ran out of memory; trying the next setting") == 2
    assert chosen(tmp_path / "run") == {"batch_size": 2, "grad_accum": 4, "remat": False}
    held = [int(size) for size in re.findall(r"arrays in memory before: (\d+) bytes", first.stderr)]
    assert len(held) == 3
    assert max(held) < 1000
    second = runs.complete(["1", *runs.flags(text, tmp_path / "run"), "--resume"], tmp_path, SMALL_DEVICE)
    assert second.returncode == 0, second.stderr
    assert chosen(tmp_path / "run") == {"batch_size": 2, "grad_accum": 4, "remat": True}
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-4)


def test_with_fit_off_the_run_ends_in_one_line(text: Path, tmp_path: Path) -> None:
    ended = runs.complete(["1", *runs.flags(text, tmp_path / "run"), "--fit", "off"], tmp_path, SMALL_DEVICE)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: the device is out of memory: close what else uses it")
    assert "Traceback" not in ended.stderr
