"""Which lines of metrics.jsonl are records, and what is read of snapshots and a summary."""

import json
from pathlib import Path
from typing import Any

from moe_jax.runs import records
from moe_jax.runs.records import last_train_record, read_metrics, read_snapshots


def line(**record: Any) -> bytes:
    return json.dumps({"split": "train", "step": 1} | record).encode() + b"\n"


def test_records_are_sorted_by_split_and_what_a_crash_leaves_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {"train": [], "val": []}
    assert last_train_record(tmp_path) == {}
    lines = [line(loss=float("nan")), b"\n", b"[1]\n", b'{"step": 1}\n', line(step=3), line(step=2, split="val")]
    (tmp_path / records.METRICS).write_bytes(b"".join([*lines, line(step=4)[:-5]]))
    assert read_metrics(tmp_path) == {
        "train": [{"split": "train", "step": 1, "loss": None}, {"split": "train", "step": 3}],
        "val": [{"split": "val", "step": 2}],
    }
    assert last_train_record(tmp_path) == {"split": "train", "step": 3}


def test_snapshots_come_back_earliest_first(tmp_path: Path) -> None:
    """By their number. Files with other names are left out."""
    assert read_snapshots(tmp_path) == []
    (tmp_path / records.TRACES).mkdir()
    for step in (10**8, 99_999_999, 10):
        (tmp_path / records.TRACES / f"step_{step:08d}.json").write_text(json.dumps({"step": step}))
    for name in ("step_00000008", "step_9.json", "step_00000011.json.draft", "notes.json"):
        (tmp_path / records.TRACES / name).write_text("{}")
    assert [saved["step"] for saved in read_snapshots(tmp_path)] == [10, 99_999_999, 10**8]
