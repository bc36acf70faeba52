"""Which lines of metrics.jsonl are records, and what is read of whole files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.runs import metrics
from moe_jax.runs.metrics import _NUMBERS, last_train_record, load_entropy, parse_record, read_metrics, record_lines
from moe_jax.system.folders import Folder


def line(**record: Any) -> bytes:
    return json.dumps({"split": "train"} | record).encode()


@pytest.mark.parametrize("step", [0, 1, 107, 10**6, 2**53 - 1])
def test_a_whole_number_is_a_step(step: int) -> None:
    assert parse_record(line(step=step)) == {"split": "train", "step": step}


@pytest.mark.parametrize("step", [-1, 2**53, 1.0, True, "1", None])
def test_anything_else_is_none(step: Any) -> None:
    assert parse_record(line(step=step)) is None


@pytest.mark.parametrize("loss", [2.5, 3, -1.0, None, 1e300])
def test_a_number_or_null_is_a_loss(loss: Any) -> None:
    assert parse_record(line(step=1, loss=loss)) == {"split": "train", "step": 1, "loss": loss}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_read_as_null(loss: float) -> None:
    assert parse_record(line(step=1, loss=loss)) == {"split": "train", "step": 1, "loss": None}


@pytest.mark.parametrize("loss", ["2.5", [2.5], True, 2**1000])
def test_anything_else_is_no_loss(loss: Any) -> None:
    assert parse_record(line(step=1, loss=loss)) is None


def test_a_load_is_a_table_with_equally_many_numbers_in_each_layer() -> None:
    assert parse_record(line(step=1, load=[[0.5, 0.5], [1, 0]])) is not None
    for load in ([[0.5, 0.5], [1.0]], [0.5], 0.5, [["a"]]):
        assert parse_record(line(step=1, load=load)) is None


def test_a_line_is_a_record_of_one_of_the_two_splits() -> None:
    assert parse_record(b'{"step": 1, "split": "val"}') == {"step": 1, "split": "val"}
    for odd in (
        b"",
        b"{",
        b"[1]",
        b"7",
        b'"train"',
        b'{"step": 1}',
        b'{"split": "test", "step": 1}',
        b'{"split": "val"}',
    ):
        assert parse_record(odd) is None, odd


@pytest.mark.parametrize("name", _NUMBERS)
def test_every_number_of_a_record_is_checked(name: str) -> None:
    assert parse_record(line(step=1, **{name: 2})) is not None
    assert parse_record(line(step=1, **{name: None})) is not None
    assert parse_record(line(step=1, **{name: "2"})) is None


@pytest.mark.parametrize("number", [2**1000, -(2**1000), 1.1e301, True])
def test_a_load_holds_numbers_that_can_be_computed_with(number: Any) -> None:
    assert parse_record(line(step=1, load=[[1.0, number]])) is None
    assert parse_record(line(step=1, load=[[1.0, 1e300]])) is not None
    assert parse_record(line(step=1, load=[])) is not None


# Whole files


def write(folder: Path, *lines: bytes) -> None:
    (folder / metrics.NAME).write_bytes(b"".join(lines))


def test_every_line_comes_with_its_record(tmp_path: Path) -> None:
    assert list(record_lines(Folder(tmp_path))) == []
    lines = [line(step=1) + b"\n", b"cut\r\n", line(step=2)]
    write(tmp_path, *lines)
    found = list(record_lines(Folder(tmp_path)))
    assert [text for text, _ in found] == lines
    assert [record and record["step"] for _, record in found] == [1, None, 2]


def test_a_line_without_end_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LINE_BYTES", 40)
    write(tmp_path, b"x" * 90 + b"\n", line(step=3) + b"\n")
    assert [len(text) for text, _ in record_lines(Folder(tmp_path))] == [40, 40, 11, len(line(step=3)) + 1]


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, line(step=1))
    monkeypatch.setattr(metrics, "_MAX_BYTES", len(line(step=1)))
    assert len(list(record_lines(Folder(tmp_path)))) == 1
    monkeypatch.setattr(metrics, "_MAX_BYTES", len(line(step=1)) - 1)
    with pytest.raises(OSError, match="bytes, and at most"):
        list(record_lines(Folder(tmp_path)))


def test_records_are_sorted_by_split_and_loads_have_one_shape(tmp_path: Path) -> None:
    """The newest load says which shape. The records of other loads stay, without their load."""
    assert read_metrics(tmp_path) == {"train": [], "val": []}
    records: list[dict[str, Any]] = [
        {"step": 1, "load": [[1, 0, 0]]},
        {"step": 2, "load": [[1, 0], [0, 1]]},
        {"step": 3, "split": "val"},
        {"step": 4, "load": [[]]},
        {"step": 5, "load": []},
        {"step": 6},
        {"step": 7, "load": [[0.5, 0.5]]},
        {"step": 8, "load": [[0.25, 0.75]]},
    ]
    write(tmp_path, *(line(**record) + b"\n" for record in records), b"no record\n")
    found = read_metrics(tmp_path)
    assert found["val"] == [{"split": "val", "step": 3}]
    loads = {r["step"]: r.get("load") for r in found["train"]}
    assert [step for step, load in loads.items() if load is None] == [1, 2, 4, 6]
    assert (loads[5], loads[7], loads[8]) == ([], [[0.5, 0.5]], [[0.25, 0.75]])


def test_the_search_from_the_end_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of gigabytes whose end holds no record of training."""
    write(tmp_path, line(step=1) + b"\n", b"x" * 100)
    monkeypatch.setattr(metrics, "_TAIL_BYTES", 4)
    monkeypatch.setattr(metrics, "_MOST_TAIL_BYTES", 256)
    assert last_train_record(Folder(tmp_path))["step"] == 1
    monkeypatch.setattr(metrics, "_MOST_TAIL_BYTES", 16)
    assert last_train_record(Folder(tmp_path)) == {}


def test_the_search_from_the_end_reads_four_times_as_much_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the whole search reads at most a third more than its last part."""
    sizes: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            sizes.append(size or 0)
            return super().read(size)

    text = line(step=1) + b"\n" + b"x" * 100
    monkeypatch.setattr(metrics, "_TAIL_BYTES", 4)
    monkeypatch.setattr(Folder, "open", lambda *_: Counted(text))
    assert last_train_record(Folder(tmp_path))["step"] == 1
    assert sizes == [4, 16, 64, len(text)]


@pytest.mark.parametrize(
    ("load", "evenness"),
    [
        ([0.25] * 4, 1),
        ([7.0, 0, 0, 0], 0),
        ([5, 5, 0, 0], 0.5),
        ([0.9, 0.1], 0.469),  # -(0.9 ln 0.9 + 0.1 ln 0.1) / ln 2
        ([0, 0, 0, 0], 0),
        ([1.0], 0),
        ([[1, 1], [1, 0]], [1, 0]),
    ],
)
def test_the_evenness_of_a_load(load: Any, evenness: Any) -> None:
    """Entropy over its largest value. Only shares count. Without any token, and for one expert, it is 0."""
    found = load_entropy(np.array(load, float))
    np.testing.assert_allclose(found, evenness, atol=5e-5)
    assert not np.signbit(found).any(), "-0.0 is shown as -0.000"
