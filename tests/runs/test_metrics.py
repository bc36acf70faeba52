"""Which lines of metrics.jsonl are records."""

import json
from typing import Any

import pytest

from moe_jax.runs.metrics import parse_record


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
