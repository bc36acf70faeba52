"""Which routing snapshots are read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.runs.snapshots import FOLDER, read_snapshots

SAVED = {"tokens": [0, 5], "expert": [[0, 1, 2, 3]], "load": [[0.25] * 4], "entropy": [1], "drop": [0.5]}


def write(run: Path, at: int, **changes: Any) -> None:
    (run / FOLDER).mkdir(exist_ok=True)
    (run / FOLDER / f"step_{at:08d}.json").write_text(json.dumps({"step": at} | SAVED | changes))


def test_they_come_back_earliest_first(tmp_path: Path) -> None:
    for step in (30, 10, 20):
        write(tmp_path, step)
    write(tmp_path, 25, tokens=[2**24 - 1, 0])  # the largest id
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [10, 20, 25, 30]
    assert read_snapshots(tmp_path)[0] == {"step": 10} | SAVED


@pytest.mark.parametrize(
    "odd",
    [
        {"tokens": [-1, 5]},
        {"tokens": [2**24, 5]},
        {"tokens": [0.0, 5.0]},
        {"tokens": []},
        {"tokens": [[0, 5]]},
        {"expert": [[0, 1, 2, -3]]},
        {"expert": [0, 1, 2, 3]},
        {"load": [["a"] * 4]},
        {"drop": 0.5},
        {"step": 11},
    ],
    ids=str,
)
def test_one_that_no_run_writes_is_left_out(odd: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, 10, **odd)
    write(tmp_path, 20)
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [20]


def test_those_of_another_shape_than_the_last_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 10, tokens=[1, 2, 3])
    write(tmp_path, 20)
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [20]
