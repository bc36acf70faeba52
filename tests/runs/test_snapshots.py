"""Which routing snapshots are read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.runs.snapshots import FOLDER, read_snapshots, snapshot_steps
from moe_jax.system.folders import Folder

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
        {"expert": [[0, 1, 2, 2**24]]},
        {"expert": [[0, 1, 2, 1.5]]},
        {"expert": [[]]},
        {"expert": [0, 1, 2, 3]},
        {"load": [["a"] * 4]},
        {"load": [[0.25] * 3, [0.25] * 4]},
        {"load": [0.25] * 4},
        {"entropy": [float("nan")]},
        {"entropy": ["1"]},
        {"entropy": [[1]]},
        {"drop": [float("inf")]},
        {"drop": 0.5},
        {"drop": None},
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


def test_the_largest_expert_and_whole_numbers_are_usual(tmp_path: Path) -> None:
    write(tmp_path, 10, expert=[[2**24 - 1, 0, 0, 0]], load=[[1, 0, 0, 0]], drop=[0])
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [10]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"step": 10}', '{"step": 10, "tokens": {"a": 1}}'])
def test_a_file_that_is_no_snapshot_is_left_out_and_the_later_ones_are_read(text: str, tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 20)
    (tmp_path / FOLDER / "step_00000010.json").write_text(text)
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [5, 20]


def test_files_with_other_names_are_none(tmp_path: Path) -> None:
    assert snapshot_steps(Folder(tmp_path)) == {}
    assert read_snapshots(tmp_path) == []
    for step in (10**9, 99_999_999):
        write(tmp_path, step)
    for name in ("step_00000008", "step_9.json", "step_00000011.json.draft", "notes.json"):
        (tmp_path / FOLDER / name).write_text("{}")
    assert list(snapshot_steps(Folder(tmp_path)).items()) == [
        (99_999_999, "traces/step_99999999.json"),
        (10**9, "traces/step_1000000000.json"),
    ]


@pytest.mark.parametrize(("number", "large"), [("0.25", "1e999"), ("[1]", "[1e999]"), ("0.5", "1e999")])
def test_numbers_that_are_too_large_are_no_snapshot(number: str, large: str, tmp_path: Path) -> None:
    """1e999 is JSON, and infinite."""
    write(tmp_path, 10)
    write(tmp_path, 20)
    path = tmp_path / FOLDER / "step_00000010.json"
    path.write_text(path.read_text().replace(number, large, 1))
    assert "1e999" in path.read_text()
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [20]
