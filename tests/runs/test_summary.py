"""What is read of a summary.json that anybody may have written."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_jax.runs.summary import NAME, read_summary
from moe_jax.system.folders import Folder


def read(folder: Path, **values: Any) -> dict[str, Any]:
    (folder / NAME).write_text(json.dumps(values))
    return read_summary(folder)


def test_usual_values_come_back(tmp_path: Path) -> None:
    values = {"preset": "nano", "device": "cpu", "precision": "float32", "steps": 7, "val_loss": -0.5}
    values |= {"resumed_from": None, "val_whole_stream": False, "training_flops": 1e300}
    assert read(tmp_path, **values) == values


@pytest.mark.parametrize("name", ["preset", "device", "precision"])
@pytest.mark.parametrize("odd", [7, None, True, ["nano"]])
def test_a_text_must_be_one(name: str, odd: Any, tmp_path: Path) -> None:
    assert read(tmp_path, steps=7, **{name: odd}) == {"steps": 7}


@pytest.mark.parametrize("odd", ["7", [7], {}, 2**1000, -(2**1000)])
def test_anything_else_must_be_a_number(odd: Any, tmp_path: Path) -> None:
    assert read(tmp_path, steps=odd, val_loss=1.5) == {"val_loss": 1.5}


def test_a_number_that_is_not_finite_reads_as_none(tmp_path: Path) -> None:
    assert read(tmp_path, val_loss=math.inf, loss=math.nan) == {"val_loss": None, "loss": None}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 10**5])
def test_a_file_that_is_no_object_is_empty(text: str, tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    (tmp_path / NAME).write_text(text)
    assert read_summary(tmp_path) == {}


def test_a_file_that_the_system_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Folder, "read", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        read_summary(tmp_path)


def test_texts_that_say_what_was_scored_come_back(tmp_path: Path) -> None:
    values = {"val_stream": "subset", "val_scored": "answers", "weights": "int4", "val_whole_stream": True}
    assert read(tmp_path, **values) == values
