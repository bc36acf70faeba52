"""Which lines of metrics.jsonl are records, which snapshots and values of a summary are read, and what is left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.runs import records
from moe_jax.runs.records import load_entropy, parse_record, read_metrics, read_snapshots, read_summary, snapshot_steps
from moe_jax.system.files import Folder


def line(**record: Any) -> bytes:
    return json.dumps({"split": "train", "step": 1} | record).encode()


@pytest.mark.parametrize(
    "usual",
    [
        *({"step": step} for step in (0, 2**53 - 1)),
        *({"loss": loss} for loss in (2.5, 3, -1.0, None, 1e300)),
        *({"load": load} for load in ([], [[0.5, 0.5], [1, 0]], [[1.0, 1e300]])),
        {"split": "val"},
    ],
)
def test_a_line_that_is_a_record(usual: dict[str, Any]) -> None:
    assert parse_record(line(**usual)) == {"split": "train", "step": 1} | usual


@pytest.mark.parametrize(
    "odd",
    [
        *({"step": step} for step in (-1, 2**53, 1.0, True, "1", None)),
        *({name: "2"} for name in records._NUMBERS),
        *({"loss": loss} for loss in ([2.5], True, 2**1000)),
        *({"load": load} for load in ([[0.5, 0.5], [1.0]], [0.5], 0.5, [["a"]], [[1.0, -(2**1000)]], [[1.0, True]])),
        *({"split": split} for split in ("test", None)),
    ],
    ids=lambda odd: str(odd)[:40],
)
def test_a_line_that_is_none(odd: dict[str, Any]) -> None:
    assert parse_record(line(**odd)) is None


def test_numbers_that_are_not_finite_are_null_and_no_json_is_no_record() -> None:
    assert parse_record(line(loss=float("nan"))) == {"split": "train", "step": 1, "loss": None}
    for odd in (b"", b"{", b"[1]", b"7", b'"train"', b'{"step": 1}', b"[" * 10**5):
        assert parse_record(odd) is None, odd


def test_records_are_sorted_by_split_and_loads_have_one_shape(tmp_path: Path) -> None:
    """The newest load says which shape. The records of other loads stay, without their load."""
    loads: list[Any] = [[[1, 0, 0]], [[1, 0], [0, 1]], None, [[]], [], [[0.5, 0.5], [0, 1]]]
    lines = [line(step=step, **({} if load is None else {"load": load})) + b"\n" for step, load in enumerate(loads)]
    (tmp_path / records.METRICS).write_bytes(b"".join([*lines, line(step=9, split="val")]))
    metrics = read_metrics(tmp_path)
    assert [(r["step"], "load" in r) for r in metrics["train"]] == [
        *((0, False), (1, True), (2, False), (3, False), (4, True), (5, True))
    ]
    assert [r["step"] for r in metrics["val"]] == [9]


def test_the_entropy_of_a_load() -> None:
    assert load_entropy(np.array([[1, 1, 1, 1], [3, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])).tolist() == [1, 0, 0.5, 0]


def test_values_of_a_wrong_type_are_left_out_of_the_summary(tmp_path: Path) -> None:
    path = tmp_path / records.SUMMARY
    assert read_summary(tmp_path) == {}
    good = {"preset": "nano", "steps": 3, "val_loss": None, "done": True, "openings": ["a"]}
    path.write_text(json.dumps(good | {"device": 3, "tokens": "3", "loss": [1], "opening": None, "large": 2**1000}))
    assert read_summary(tmp_path) == good
    for text in ("", "{", "[]", "7"):
        path.write_text(text)
        assert read_summary(tmp_path) == {}


SAVED = {"tokens": [0, 5], "expert": [[0, 1, 2, 3]], "load": [[0.25] * 4], "entropy": [1], "drop": [0.5]}


def write(run: Path, at: int, **changes: Any) -> None:
    (run / records.TRACES).mkdir(exist_ok=True)
    (run / records.TRACES / f"step_{at:08d}.json").write_text(json.dumps({"step": at} | SAVED | changes))


def test_snapshots_come_back_earliest_first(tmp_path: Path) -> None:
    """By their number. Files with other names, and snapshots of another shape than the last, are left out."""
    assert (snapshot_steps(Folder(tmp_path)), read_snapshots(tmp_path)) == ({}, [])
    for step in (10**8, 99_999_999, 10):
        write(tmp_path, step)
    write(tmp_path, 20, tokens=[1, 2, 3])
    write(tmp_path, 25, tokens=[2**24 - 1, 0], expert=[[2**24 - 1, 0, 0, 0]], drop=[0])
    for name in ("step_00000008", "step_9.json", "step_00000011.json.draft", "notes.json"):
        (tmp_path / records.TRACES / name).write_text("{}")
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [10, 25, 99_999_999, 10**8]
    assert read_snapshots(tmp_path)[0] == {"step": 10} | SAVED


@pytest.mark.parametrize(
    "odd",
    [
        *({"tokens": odd} for odd in ([-1, 5], [2**24, 5], [0.0, 5.0], [], [[0, 5]])),
        *({"expert": odd} for odd in ([[0, 1, 2, -3]], [[0, 1, 2, 2**24]], [[0, 1, 2, 1.5]], [[]], [0, 1, 2, 3])),
        *({"load": odd} for odd in ([["a"] * 4], [[0.25] * 3, [0.25] * 4], [0.25] * 4)),
        *({"entropy": odd} for odd in ([float("nan")], ["1"], [[1]])),
        *({"drop": odd} for odd in ([float("inf")], 0.5, None)),
        {"step": 11},
        *("", "{", "[]", "null", '{"step": 10}', json.dumps({"step": 10} | SAVED).replace("0.5", "1e999")),
    ],
    ids=str,
)
def test_a_snapshot_that_no_run_writes_is_left_out(odd: dict[str, Any] | str, tmp_path: Path) -> None:
    write(tmp_path, 10, **(odd if isinstance(odd, dict) else {}))
    if isinstance(odd, str):
        (tmp_path / records.TRACES / "step_00000010.json").write_text(odd)
    write(tmp_path, 20)
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [20]
