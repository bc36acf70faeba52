"""The suites of `benchmark.py`: what they compute from their times, by hand; and each once on a tiny model."""

import dataclasses
import importlib.util
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from suites import command, dense_baselines, layer, serving
from suites.dense_baselines import CostTable, flops_by_group
from suites.request import BenchmarkRequest

from moe_jax.certify.formulas import expert_flops
from moe_jax.certify.hlo import read_program
from moe_jax.cli.main import main
from moe_jax.config import ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.model import precision
from moe_jax.model.costs import Count
from moe_jax.model.moe.layer import MoE
from moe_jax.system import environment, machine
from moe_jax.system.machine import Times, alternate
from tests.support import short_form, tiny


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


@pytest.mark.parametrize("cpu", [True, False])
def test_the_train_suite(
    cpu: bool, products: dict[str, float], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 4, 2 and 8 s; 300, 600 and 1,200 operations at 300 a second. All run in turn on a CPU."""
    monkeypatch.setattr(CostTable, "of", lambda *_: CostTable({"head": Count(1, 1, 1)}, {}, {}, 1.0))
    monkeypatch.setattr(dense_baselines, "flops_by_group", lambda config, batch: {"a": 1e6 * batch, "b": 5e5})
    monkeypatch.setattr(dense_baselines, "runs_on_cpu", lambda: cpu)
    flops, seconds = {"none": 300, "active": 600, "total": 1200}, {"none": 4.0, "active": 2.0, "total": 8.0}

    def of(given: Any, batch: int) -> Any:
        assert batch == 2
        return SimpleNamespace(active_flops=flops[given.model.dense], seconds=seconds[given.model.dense])

    turns: list[tuple[list[float], int]] = []

    def alternate(candidates: dict[str, Any], rounds: int) -> dict[str, Times]:
        steps = {name: trainer.seconds for name, trainer in candidates.items() if name not in products}
        turns.append((list(steps.values()), rounds))
        return {name: Times((taken,)) for name, taken in {**steps, **products}.items()}

    monkeypatch.setattr(dense_baselines.RandomTokenTrainer, "of", of)
    monkeypatch.setattr(dense_baselines, "alternate", alternate)
    found = dense_baselines.train(console, BenchmarkRequest(config(), 2, 9))
    assert turns == ([([4.0, 2.0, 8.0], 4)] if cpu else [([4.0], 4), ([2.0], 4), ([8.0], 4)])
    assert found["tokens_per_second"] == 32 / 4
    assert found["share_of_matmul_peak"] == 0.25
    assert (found["wall_over_dense_active"], found["dense_total_over_wall"]) == (2, 2)
    assert found["models"]["dense-active"] == {"ms_per_step": 2000, "mflops_per_token": 2.5}
    how = "all models in turn" if cpu else "one model after another"
    for words in ("16 tokens/s", "dense, active parameters", "2.5 MFLOP a token", how):
        assert words in printed(console)


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


def test_the_layer_suite(products: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """MoE in 6 s, without drops in 9; the plain dense layout in 4, the best in 3; all experts in 12."""
    seconds = {"dense, plain": 4.0, "dense, best": 3.0, "dense, our matmul": 5.0, **products}
    monkeypatch.setattr(layer, "dense_layouts", lambda _: {n: (print, None) for n in seconds if "dense" in n})
    seconds |= {"MoE": 6.0, "MoE, no drops": 9.0, "all experts": 12.0}
    monkeypatch.setattr(layer, "alternate", lambda candidates, rounds: {n: Times((seconds[n],)) for n in candidates})
    monkeypatch.setattr(layer, "with_reused_output", lambda *_: None)
    asked: list[tuple[str, str]] = []

    def layer_function(model: ModelConfig, moe: type = MoE) -> tuple[Any, None]:
        asked.append((model.routing.dispatch, moe.__name__))
        return print, None

    monkeypatch.setattr(layer, "layer_function", layer_function)
    numbers, times = layer.benchmark_layer(config().model, 9)
    assert asked == [("capacity", "MoE"), ("blocks", "MoE"), ("capacity", "AllExpertsMoE")]
    assert numbers == {
        "wall_over_dense_active": 1.5,
        "wall_over_best_dense": 2.0,
        "dropless_wall_over_best_dense": 3.0,
        "dense_all_over_wall": 2.0,
        "layer_share_of_matmul_peak": pytest.approx(3 * layer.active_flops(config().model, 8 * 16) / 6 / 300),
        "matmul_flops_per_second": 300,
    }
    assert set(times) == set(seconds)


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


@pytest.mark.slow
def test_serve_counts_the_tokens_and_leaves_no_text_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STREAMS", 2)
    monkeypatch.setattr(serving, "TOKENS", 6)
    made: list[serving.Bench] = []
    true = serving.Bench
    monkeypatch.setattr(serving, "Bench", lambda *given: made.append(true(*given)) or made[0])
    small = dataclasses.replace(RunConfig(), model=tiny.config(vocab_size=300, seq_len=16))
    numbers = serving.serve(Console(file=io.StringIO()), BenchmarkRequest(small, 1, 1))
    assert all(value > 0 for value in numbers.values())
    assert not made[0].many.running
    assert not made[0].one.running
    prompts = made[0].many.counts.prompt_tokens
    assert (prompts > 0, prompts % serving.PROMPT_TOKENS) == (True, 0)
    one = made[0].one.counts
    assert 0 < one.generated_tokens <= 6 * one.texts, "a text has at most TOKENS tokens"
