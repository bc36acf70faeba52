"""`benchmarks/predict_card.py`: a file of a device, and the table that is made from such files."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import predict_card
import pytest
from predict_card import COLUMNS, pair, row, speeds, table
from predicted import card_parts
from predicted.card_parts import Part
from rich.console import Console

from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.model.costs import training_flops
from moe_jax.planning.target import load_target
from moe_jax.system import machine
from tests.support import tiny
from tests.support.programs import compiled_for_gpu

ROOT = Path(__file__).parents[2]
CONFIG = RunConfig(
    model=tiny.config(layers=1),
    train=TrainConfig(batch_size=2, grad_accum=2, optimizer="adamw"),
    execution=ExecutionConfig(compute_dtype="float32"),
)


def test_the_speeds_of_a_step_by_hand() -> None:
    """2 x 2 sequences of 8 tokens. The device multiplies at ten times the step's own rate of one step a second."""
    flops = training_flops(CONFIG, 1)
    found = speeds(CONFIG, None, 0.5, pair(None, 10 * flops))
    assert found == {
        "step_ms": pair(None, 500),
        "tokens_per_second": pair(None, 64),
        "share_of_product_rate": pair(None, 0.2),
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of this processor. Of the parts, the second cannot be computed."""

    def broken(x: jax.Array) -> jax.Array:
        raise RuntimeError("no such kernel\nand more")

    def parts(config: RunConfig, device: Any) -> list[Part]:
        shape = (jax.ShapeDtypeStruct((4,), jnp.float32),)
        return [
            Part("the card", name, jax.jit(f), shape) for name, f in (("a", jnp.sin), ("b", broken), ("c", jnp.cos))
        ]

    monkeypatch.setattr(predict_card, "parts", parts)
    monkeypatch.setattr(machine, "SIZE", 16)
    console = Console(quiet=True)
    return json.loads(json.dumps(predict_card.measured_device(console, CONFIG, jax.devices()[0], 1)))


def test_a_file_has_all_that_could_be_measured(measured: dict[str, Any]) -> None:
    """The processor has no description, so nothing is predicted, and it does not say how much memory was in use."""
    assert measured["failed"] == {"b": "RuntimeError: no such kernel"}
    assert list(measured["parts_ms"]) == ["a", "c"]
    assert measured["setting"]["batch_size"] == 2
    assert measured["versions"] == machine.versions()
    for name in ("step_ms", "tokens_per_second", "share_of_product_rate"):
        assert measured[name]["predicted"] is None
        assert measured[name]["measured"] > 0
    parameters = sum(x.size for x in jax.tree.leaves(tiny.build(CONFIG.model)[1]))
    assert measured["step_mib"]["predicted"] * 2**20 > 3 * 4 * parameters, "the plan has weights and two moments"
    assert measured["step_mib"]["measured"] is None
    assert measured["tokens_per_second"]["measured"] == pytest.approx(32e3 / measured["step_ms"]["measured"])


RECORD = {
    "schema": 1,
    "device": "NVIDIA GeForce RTX 3050 Laptop GPU",
    "preset": "seed-158m",
    "setting": {"batch_size": 32, "grad_accum": 1, "optimizer": "adamw", "remat": True, "precision": "bfloat16"},
    "step_mib": {"predicted": 2361.6, "measured": 2401.2},
    "step_ms": {"predicted": 448.2, "measured": None},
    "tokens_per_second": {"predicted": 18277.6, "measured": 17000.0},
    "share_of_product_rate": {"predicted": 0.6, "measured": 0.514},
}


def test_a_record_becomes_a_row() -> None:
    assert row(RECORD) == (
        "GeForce RTX 3050 Laptop GPU, `seed-158m`",
        "bfloat16, 32 x 1, adamw, remat",
        "2,362 / 2,401",
        "448 / -",
        "18,278 / 17,000",
        "60% / 51%",
    )
    assert table([RECORD])[0] == f"| {' | '.join(COLUMNS)} |"


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORD))
    assert predict_card.read_records(tmp_path) == [RECORD]
    (tmp_path / "b.json").write_text(json.dumps(RECORD | {"schema": 2}))
    with pytest.raises(ValueError, match=r"^b.json: schema 2"):
        predict_card.read_records(tmp_path)


def test_the_page_has_the_table_of_the_recorded_cards() -> None:
    records = predict_card.read_records()
    assert "\n".join(["", *table(records), ""]) in (ROOT / "docs/gpu.md").read_text()


def test_the_largest_difference_is_relative_to_each_array() -> None:
    expected = {"a": np.array([4.0, -8.0]), "b": np.array([0.1]), "c": np.zeros(2)}
    assert predict_card.largest_difference(expected, expected) == 0
    off = expected | {"b": np.array([0.11])}
    assert predict_card.largest_difference(expected, off) == pytest.approx(0.1)
    assert math.isinf(predict_card.largest_difference(expected, expected | {"c": np.ones(2)}))


@pytest.mark.slow
def test_every_part_runs_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_parts, "SIZE", 16)
    monkeypatch.setattr(card_parts, "COPIED", 1024)
    for part in card_parts.parts(CONFIG, jax.devices()[0]):
        assert predict_card.measured_part(part, None, 1)["measured"], part.name


@compiled_for_gpu
def test_a_described_card_is_predicted() -> None:
    target = load_target("quadro-t1000-4gb")
    found = predict_card.predicted_card(dataclasses.replace(CONFIG, preset="nano"), target, 12.5)
    assert found["step_mib"] == pair(12.5, None)
    assert found["tokens_per_second"]["predicted"] == pytest.approx(32e3 / found["step_ms"]["predicted"])
    assert 0 < found["share_of_product_rate"]["predicted"] < 1
    assert found["description"] == target.text
