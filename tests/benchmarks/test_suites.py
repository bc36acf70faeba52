"""The suites of `benchmark.py`: what they compute from their times, by hand; and each once on a tiny model."""

import dataclasses
import importlib.util
import io
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from suites import command, layer
from suites.dense_baselines import flops_by_group
from suites.request import BenchmarkRequest

from moe_jax.certify.formulas import expert_flops, layer_flops
from moe_jax.certify.hlo import read_program
from moe_jax.cli.main import main
from moe_jax.config import ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.model import precision
from moe_jax.system import environment, machine
from moe_jax.system.machine import Times, alternate
from tests.support import short_form


def config(**changes) -> RunConfig:
    """A model of 60 entries and T = 16. `changes` are fields of `ModelConfig` or of its `RoutingConfig`."""
    values = {"vocab_size": 60, "seq_len": 16, "layers": 2, "width": 16, "heads": 2, "experts": 4, "expert_hidden": 24}
    values |= changes
    policy = {f.name: values.pop(f.name) for f in dataclasses.fields(RoutingConfig) if f.name in values}
    model = ModelConfig(**values, routing=RoutingConfig(**policy))
    execution = ExecutionConfig(compute_dtype="float32")
    return RunConfig(model=model, train=TrainConfig(steps=10), execution=execution)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATMUL_SIZES", (32,))
    monkeypatch.setattr(machine.matmuls, "__defaults__", ((32,),))
    monkeypatch.setattr(machine, "READ_BYTES", 2**16)


def test_candidates_run_in_turn_and_warm_ups_do_not_count() -> None:
    order: list[str] = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: time.sleep(0.002) or order.append("b")}, 3, 1)
    assert order == ["a", "b"] * 4
    assert len(times["a"].seconds) == len(times["b"].seconds) == 3
    assert min(times["b"].seconds) >= 0.002
    assert Times((1.0, 2.0, 3.0, 4.0)).median == 2.5
    assert Times((1.0, 2.0, 3.0, 4.0)).spread == pytest.approx((3.25 - 1.75) / 2.5)


def test_bound_by_hand() -> None:
    """T 16, K 2, E 4, cf 1.25: 10 slots. Two sequences: 2*4*10 rows of 2*3*16*24 operations, 32 tokens of 2*16*4."""
    assert config().model.capacity == 10
    assert layer_flops(config().model, 2) == 80 * 2304 + 32 * 128
    assert layer_flops(config(shared_experts=1).model, 2) == (80 + 32) * 2304 + 32 * 128


@pytest.mark.parametrize("changes", [{"activation": "gelu"}, {"shared_experts": 1}], ids=str)
def test_dense_layouts_are_one_function_with_the_arithmetic_of_a_token_s_experts(changes: dict) -> None:
    model = config(**changes).model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16)), jnp.float32)
    expected = expert_flops(model, 32 * (model.routing.top_k + model.shared_experts))
    first = None
    for name, (function, weights) in layer.dense_layouts(model).items():
        program = jax.jit(function).lower(weights, x).compile()
        assert read_program(program.as_text()).flops == expected, name
        y = np.asarray(program(weights, x))
        first = y if first is None else first
        np.testing.assert_allclose(y, first, atol=1e-5)
    assert layer.active_flops(model, 32) == expected + 32 * 2 * 16 * 4


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Two products: of 100 operations in 0.5 s, and of 900 in 3 s. So the machine does 300 a second."""
    monkeypatch.setattr(machine, "matmuls", lambda dtype: {"a": (print, 100), "b": (print, 900)})
    return {"a": 0.5, "b": 3.0}


def test_the_formulas_by_hand() -> None:
    """T 16 is one block of queries, which read 16 keys. D 16, V 60, L 2. Blocks: 32 tokens, 2 of 4 experts each, are 64
    pairs in blocks of 16 rows, of which 4 come first and 63 // 16 follow: 112 rows of three products of 16 x 24."""
    flops = flops_by_group(config(dispatch="blocks"), 2)
    assert flops["attention"] == 2 * (6 * 4 * 16**2 + 6 * 2 * 16 * 16)
    assert flops["head"] == 6 * 16 * 60
    assert flops["experts and router"] == 2 * 3 * (112 * 2304 + 32 * 128) / 32
    grouped = flops_by_group(config(heads=4, kv_heads=2, head_size=6), 2)  # qkv 16 x 48, out 24 x 16
    assert grouped["attention"] == 2 * (6 * (16 * 48 + 24 * 16) + 6 * 2 * 24 * 16)
    dense = flops_by_group(config(dense="active"), 2)
    assert dense["experts and router"] == 2 * 6 * 3 * 16 * 49  # an FFN as wide as two experts, and one for the router


def test_peers_without_their_extra_are_left_out_or_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(command.run, ["peers"]) == 1
    assert "uv run --extra peers benchmark.py peers" in capsys.readouterr().err
    assert command.suites_of("all") == ["moe", "train", "decode"]


def numbers_in(result: dict) -> list[float]:
    return [n for value in result.values() for n in (numbers_in(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("part", short_form(["moe", "train", "decode"], ["moe"]))
def test_suites_print_tables_and_give_their_numbers(part: str, console: Console) -> None:
    numbers = command.suite(part)(console, BenchmarkRequest(config(layers=1), 2, 1))
    assert all(np.isfinite(value) and value > 0 for value in numbers_in(numbers))
    assert "median ms" in printed(console)
    assert "_" not in printed(console), "words, not the names of the JSON object"
    if part == "train":
        active, total = (numbers["models"][name]["mflops_per_token"] for name in ("dense-active", "dense-total"))
        assert active < numbers["models"]["moe"]["mflops_per_token"] < total


@pytest.mark.parametrize("part", ["train", "decode"])
def test_a_record_repeats_what_was_asked(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line of the output is one JSON object."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare_environment", lambda: None)
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "AMX")
    monkeypatch.setattr(command, "suite", lambda name: lambda console, request: {"models": {}})
    asked = [part, "--preset", "nano", "--batch-size", "3", "--rounds", "2"]
    assert command.run(asked) == 0
    (written,) = tmp_path.rglob("*.json")
    assert written.parent == tmp_path / "runs/bench"
    record = json.loads(written.read_text())
    assert record["command"].removeprefix("uv run benchmark.py ").split() == asked
    assert record.get("training_precision") == {"train": "bfloat16", "decode": None}[part]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"models": {}}


def test_a_number_out_of_range_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.run, ["moe", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds 0: must be between 1 and 10,000\n"
