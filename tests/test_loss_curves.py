"""The runs of a suite of `benchmarks/loss_curves.py` differ in one field, the suite's own, and in nothing else."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import SECTIONS

spec = importlib.util.spec_from_file_location("loss_curves", Path(__file__).parents[1] / "benchmarks/loss_curves.py")
assert spec is not None
assert spec.loader is not None
loss_curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loss_curves)

FIELD = {
    "precision": ("execution", "compute_dtype", ["float32", "bfloat16", "float16"]),
    "optimizers": ("train", "optimizer", ["adamw", "adamw-bf16", "adamw-8bit", "adafactor", "muon"]),
    "weights": ("train", "param_dtype", ["float32", "bfloat16"]),
    "seeds": ("train", "seed", [0, 1, 2]),
}


@pytest.mark.parametrize("suite", FIELD)
def test_the_runs_of_a_suite_differ_in_one_field(suite: str, tmp_path: Path) -> None:
    assert set(loss_curves.SUITES) == set(FIELD)
    section, name, values = FIELD[suite]
    preset, steps, variants = loss_curves.SUITES[suite]
    configs = [loss_curves.configure(preset, steps, changes, tmp_path / "run") for changes in variants]
    assert [getattr(c.section(section), name) for c in configs] == values
    assert {(c.preset, c.train.steps, c.data.source, c.train.log_every) for c in configs} == {
        (preset, steps, "stories", 1)
    }

    def rest(config: Any) -> dict[str, Any]:
        found = {s: dataclasses.asdict(config.section(s)) for s in SECTIONS}
        found[section].pop(name)
        return found

    assert all(rest(c) == rest(configs[0]) for c in configs)
