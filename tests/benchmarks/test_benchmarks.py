"""The parts of benchmark.py on a model that is small enough: what they count, and that they measure what they say."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from moe_jax.benchmarks import cost_table, decoding, dense_baselines, feeding, layer, mixtral, peers, suites, weights
from moe_jax.benchmarks.request import BenchmarkRequest
from moe_jax.benchmarks.uniform_routing import UniformMoE
from moe_jax.cli import benchmark
from moe_jax.cli.main import main, run_as
from moe_jax.config import (
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    RoutingConfig,
    RunConfig,
    TrainConfig,
    UserError,
)
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model import precision
from moe_jax.model.costs import bound_flops, count_parameters, expert_flops, totals
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import abstract_model, merge
from moe_jax.planning import search, suite
from moe_jax.planning.device_memory import Bound, Memory
from moe_jax.planning.target import Target
from moe_jax.system import environment, machine
from moe_jax.system.machine import Measured, Times, alternate, with_reused_output
from tests.support import tiny


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


def test_a_candidate_may_measure_its_own_seconds() -> None:
    times = alternate({"elsewhere": lambda: Measured(7.0), "here": lambda: 7.0}, 2, 0)
    assert times["elsewhere"].seconds == (7.0, 7.0)
    assert max(times["here"].seconds) < 1


def test_the_median_of_a_turn_counts() -> None:
    slow_at_first = iter([100.0, *[1.0] * 10_000])

    def run() -> Measured:
        time.sleep(0.005)
        return Measured(next(slow_at_first))

    assert alternate({"a": run}, 1, 0, turn=0.1)["a"].seconds == (1.0,)


def test_a_recycled_call_gives_the_same_results_again() -> None:
    call = with_reused_output(lambda x, y: {"sum": x + y, "product": x * y}, jnp.arange(4.0), jnp.full(4, 3.0))
    for _ in range(3):
        result = call()
        np.testing.assert_array_equal(result["sum"], [3, 4, 5, 6])
        np.testing.assert_array_equal(result["product"], [0, 3, 6, 9])


def test_bound_by_hand() -> None:
    """T 16, K 2, E 4, cf 1.25: 10 slots. Two sequences: 2*4*10 rows of 2*3*16*24 operations, 32 tokens of 2*16*4."""
    assert config().model.capacity == 10
    assert bound_flops(config().model, 2) == 80 * 2304 + 32 * 128
    assert bound_flops(config(shared_experts=1).model, 2) == (80 + 32) * 2304 + 32 * 128


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "tied_head": False, "positions": "learned"},
        {"shared_experts": 1},
        {"dense": "active"},
        {"dispatch": "blocks"},
        {"dispatch": "blocks", "activation": "gelu", "shared_experts": 1, "top_k": 3},
    ],
    ids=str,
)
def test_formula_and_program_agree(changes: dict) -> None:
    found = cost_table.compute(config(**changes), 2)
    assert found.difference < 0.02, (found.formula, found.compiled)
    assert min(found.compiled.values()) > 0


def test_the_cost_table_of_blocks_by_hand() -> None:
    """32 tokens, 2 of 4 experts each: 64 pairs in blocks of 16 rows, of which 4 come first and 63 // 16 follow; that is
    112 rows, and 80 at the capacity. Three products of 16 x 24 and a router of 16 x 4, in two layers."""
    found = cost_table.formula(config(dispatch="blocks").model, 2)
    assert found["experts and router"] == 2 * 3 * (112 * 2304 + 32 * 128) / 32


LAYERS = pytest.mark.parametrize(
    "changes", [{"activation": "gelu"}, {"activation": "swiglu"}, {"shared_experts": 1}], ids=str
)


@LAYERS
def test_dense_layouts_are_one_function(changes: dict) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16)), jnp.float32)
    results = [np.asarray(function(w, x)) for function, w in layer.dense_layouts(config(**changes).model).values()]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5)


@LAYERS
def test_dense_layouts_have_the_arithmetic_of_a_token_s_experts(changes: dict) -> None:
    model = config(**changes).model
    x = jnp.zeros((2, 16, 16))
    expected = expert_flops(model, 32 * (model.routing.top_k + model.shared_experts))
    found = {name: layer.compiled_flops(run, w, x) for name, (run, w) in layer.dense_layouts(model).items()}
    assert found == dict.fromkeys(found, expected)
    assert layer.active_flops(model, 32) == expected + 32 * 2 * 16 * 4


def test_decoding_must_read_the_active_parameters() -> None:
    """By hand: embedding 60*16 (tied), two layers of attention 4*16*16, router 16*4 and two experts of 3*16*24, and
    five norms of 16; four bytes each."""
    assert decoding.active_bytes(config()) == 4 * (960 + 2 * (1024 + 64 + 2304) + 80)


KEYS = {
    "moe": {
        *("flops_over_bound_forward", "flops_over_bound_grad", "wall_over_dense_active", "wall_over_best_dense"),
        *("dropless_wall_over_best_dense", "dropless_flops_over_ideal"),
        *("dense_all_over_wall", "wall_growth_8_to_64_experts", "layer_share_of_matmul_peak"),
        *("train_step_share_of_matmul_peak", "temp_bytes", "temp_bytes_plain_loss"),
    },
    "train": {"tokens_per_second", "share_of_matmul_peak", "models"},
    "decode": {"decode_share_of_bandwidth_bound", "decode_ms_per_token_batch1", "uncached_4_token_ms"},
    "pipeline": {
        *("tokenizing_bytes_MB_per_second", "tokenizing_BPE_of_300_MB_per_second", "batch_ms"),
        *("save_seconds_per_GB", "restore_seconds", "verification_percent"),
    },
}


def test_memory_has_one_object_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that says 700 MiB for each of the 8, 6, 2 or 0 bytes of an optimizer's state, and no more for a step;
    300 between steps. A 4 GB card's budget is 2,402 MiB, the 12 GB one's above 5,600."""

    def step(config: RunConfig, target: Target) -> search.Row:
        state = {"adamw": 8, "adamw-bf16": 6, "adamw-8bit": 2, "adafactor": 0}[config.train.optimizer]
        taken = Bound({"cublas": Memory(700 * state, 0, 0, warned=False)})
        return search.Row(config, "float16", state, 4, taken, taken.fits(target), "cuDNN's")

    monkeypatch.setattr(search, "plan_step", step)
    monkeypatch.setattr(search, "plan_inference", lambda config, target: {"prefill": 300.0})
    printed = io.StringIO()
    batched = dataclasses.replace(config(), train=TrainConfig(batch_size=2, grad_accum=4))
    found = suite.memory(Console(file=printed, width=120), batched)
    assert set(found) == set(suite.TARGETS) >= {"rtx3050-4gb", "quadro-t1000-4gb"}
    for name in ("rtx3050-4gb", "quadro-t1000-4gb"):
        plan = found[name]
        assert (plan["total_mib"], plan["fits"], plan["micro_batch"]) == (1400, True, 8)
        assert (plan["optimizer"], plan["grad_accum"], plan["remat"]) == ("adamw-8bit", 1, False)
        assert name in printed.getvalue()
    assert (found["rtx3060-12gb"]["total_mib"], found["rtx3060-12gb"]["optimizer"]) == (5600, "adamw")


@pytest.mark.parametrize("part", benchmark.EXTRAS)
def test_a_part_without_its_extra_says_how_to_have_it(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "has_cuda_plugin", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(lambda argv: run_as(benchmark.Benchmark, argv, "benchmark.py"), [part]) == 1
    extra = benchmark.EXTRAS[part][0]
    assert f"uv run --extra {extra} benchmark.py {part}" in capsys.readouterr().err
    assert benchmark.Benchmark()._suites() == ["moe", "train", "decode", "pipeline"]


def test_the_shape_that_both_sides_build() -> None:
    """By hand: embedding and head 60*16 each, two layers of attention 4*16*16, router 16*4, four experts of 3*16*24 and
    two norms, and the last norm."""
    ours = peers.like_mixtral(config(activation="gelu", bias=True, norm="layernorm", positions="learned", dropout=0.1))
    by_hand = 2 * 960 + 2 * (1024 + 64 + 4 * 1152 + 2 * 16) + 16
    assert totals(count_parameters(ours.model)).total == by_hand
    shape = peers.shape_of(ours, 3)
    assert (shape.width, shape.experts, shape.top_k, shape.batch_size, shape.prompt) == (16, 4, 2, 3, 16)
    if importlib.util.find_spec("torch") is not None:  # the extra `peers`
        model = mixtral.build(shape)
        assert sum(p.numel() for p in model.parameters()) == by_hand


@pytest.mark.parametrize(("taken", "compared"), [("float32", ["float32"]), ("bfloat16", ["float32", "bfloat16"])])
def test_both_sides_train_in_the_same_precisions(
    taken: str, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy(taken))
    assert peers.shape_of(peers.like_mixtral(config()), 3).training_precisions == compared


def test_a_precision_that_the_peer_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy("float16"))
    with pytest.raises(UserError, match="this device trains in float16"):
        peers.shape_of(peers.like_mixtral(config()), 3)


EVERYTHING = {
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "bias": True,
    "tie_value_output_init": True,
    "scaled_embedding": True,
    "zero_init_residual": True,
    "qk_norm": "head",
    "norm_eps": 1e-3,
    "renormalise_gates": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "dense": "active",
    "balancing": "bias",
    "shared_experts": 1,
    "logit_noise": 0.1,
    "input_jitter": 0.1,
    "eval_capacity_factor": 1.0,
}


@pytest.mark.parametrize("name", [*PRESETS, "everything"])
def test_ours_has_the_parameters_of_mixtral(name: str) -> None:
    """Embedding, head and last norm; in a layer four projections, two of them narrower where queries share keys, a
    router, three matrices an expert and two norms."""
    given = config(**EVERYTHING) if name == "everything" else with_vocabulary(preset(name))
    ours = peers.like_mixtral(given)
    c = ours.model
    keys = c.width * c.key_value_heads // c.heads  # and values: their heads are as wide as the queries'
    attention = 2 * c.width * (c.width + keys)
    layer = attention + c.width * c.experts + 3 * c.experts * c.width * c.expert_hidden + 2 * c.width
    assert totals(count_parameters(c)).total == 2 * c.vocab_size * c.width + c.width + c.layers * layer
    assert peers.shape_of(ours, 8) == peers.shape_of(given, 8)
    assert (ours.train.optimizer, ours.train.param_dtype, ours.execution.remat) == ("adamw", "float32", False)


def test_ours_has_nothing_that_mixtral_has_not() -> None:
    plain = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False, "tied_head": False}
    assert peers.like_mixtral(config(**EVERYTHING)).model == config(**plain).model


class Pretended:
    """A peer that takes 1,000 s with one implementation of experts and 2,000 with the other; 600 s to train in
    bfloat16."""

    def __init__(self, parameters: int, precisions: list[str]) -> None:
        runs = [*(f"train-{precision}" for precision in precisions), "forward", "prefill", "decode"]
        names = [f"{name} {experts}" for name in runs for experts in mixtral.EXPERTS]
        self.about = {"candidates": names, "parameters": parameters, "versions": {"torch": "0"}}

    def run(self, name: str) -> Measured:
        return Measured((600 if "bfloat16" in name else 1000) * (1 if name.endswith("grouped_mm") else 2))


@pytest.mark.parametrize("taken", ["float32", "bfloat16"])
def test_peers_are_compared_by_their_faster_experts(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same precision, and each in its faster one."""
    monkeypatch.setattr(peers, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy(taken))
    size = totals(count_parameters(peers.like_mixtral(config()).model)).total
    with_peer = lambda size: lambda shape: contextlib.nullcontext(Pretended(size, shape.training_precisions))  # noqa: E731
    monkeypatch.setattr(peers, "peer", with_peer(size))
    numbers, times = peers.compare(config(), 2, 1)
    for name in ("forward", "prefill", "decode"):
        assert numbers[f"{name}_ratio"] == pytest.approx(1000 / times[name].median)
    assert numbers["train_ratio_float32"] == pytest.approx(1000 / times["train-float32"].median)
    if taken == "float32":
        assert numbers["train_ratio_bfloat16"] is None
        assert numbers["train_ratio_best"] == numbers["train_ratio_float32"]
    else:
        assert numbers["train_ratio_bfloat16"] == pytest.approx(600 / times["train-bfloat16"].median)
        ours = min(times["train-float32"].median, times["train-bfloat16"].median)
        assert numbers["train_ratio_best"] == pytest.approx(600 / ours)
    assert set(suites.RATIOS.values()) == {name for name in numbers if "_ratio" in name}
    json.dumps(numbers)
    monkeypatch.setattr(peers, "peer", with_peer(size + 1))
    with pytest.raises(AssertionError, match=f"{size + 1} parameters, ours {size}"):
        peers.compare(config(), 2, 1)


def test_a_ratio_below_one_says_that_ours_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = dict.fromkeys(suites.RATIOS.values(), 1.5) | {"train_ratio_bfloat16": None, "decode_ratio": 0.5}
    monkeypatch.setattr(peers, "compare", lambda *request: (numbers, {}))
    printed = io.StringIO()
    suites.against_peers(Console(file=printed, width=120), BenchmarkRequest(config(), 2, 1, None))
    lines = [line for line in printed.getvalue().splitlines() if " x " in line]
    assert len(lines) == len(numbers) - 1
    assert [line for line in lines if "SLOWER" in line] == ["decoding: 0.50 x as fast as Mixtral: ours is SLOWER"]


def numbers_in(found: dict) -> list[float]:
    return [n for value in found.values() for n in (numbers_in(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("part", KEYS)
def test_parts_print_tables_and_give_their_numbers(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "CORPUS", DataConfig(source="stories", vocab_size=300, stories=20))
    monkeypatch.setattr(weights, "FORMS", ("float32",))  # each form is a program to compile
    monkeypatch.setattr(weights, "beside_llama_cpp", lambda *_: {})
    printed = io.StringIO()
    quality = {"none": 0.9, "active": 1.0, "total": 0.8}
    numbers = suites.SUITES[part](Console(file=printed, width=120), BenchmarkRequest(config(), 2, 1, quality))
    assert set(numbers) >= KEYS[part]
    assert all(np.isfinite(value) and value > 0 for value in numbers_in(numbers))
    assert "median ms" in printed.getvalue()
    if part == "moe":
        assert numbers["flops_over_bound_forward"] == pytest.approx(1)
    if part == "train":
        learned = {name: model["bits_per_byte"] for name, model in numbers["models"].items()}
        assert learned == {"moe": 0.9, "dense-active": 1.0, "dense-total": 0.8}
        active, total = (numbers["models"][name]["mflops_per_token"] for name in ("dense-active", "dense-total"))
        assert active < numbers["models"]["moe"]["mflops_per_token"] < total


@pytest.mark.parametrize("part", ["train", "decode"])
def test_a_record_repeats_what_was_asked(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare_environment", lambda: None)
    monkeypatch.setattr(benchmark.Benchmark, "_draw", lambda self, models, path: None)
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "AMX")
    monkeypatch.setitem(suites.SUITES, part, lambda console, request: {"models": {}})
    kept = part == "decode"  # the other is written where nobody keeps it
    asked = benchmark.Benchmark(part, "nano", batch_size=3, rounds=2, uniform_routing=True, record=kept)
    assert asked.execute() == 0
    (written,) = tmp_path.rglob("*.json")
    assert written.parent == tmp_path / ("benchmarks" if kept else "runs/bench")
    record = json.loads(written.read_text())
    arguments = record["command"].removeprefix("uv run benchmark.py ").split()
    assert benchmark.Benchmark.parse(arguments) == asked
    assert record.get("training_precision") == {"train": "bfloat16", "decode": None}[part]


def test_uniform_routing_gives_every_expert_as_much() -> None:
    """32 tokens with two choices each, four experts: 16 pairs each, and no token has the same expert twice."""
    graphdef, params = tiny.build(config().model)
    tokens = jnp.zeros((2, 16), jnp.int32)  # all tokens are alike, and a router sends them to the same experts
    even = merge(abstract_model(config().model, moe=UniformMoE)[0], params)(tokens, Mode.TRAIN)[1]
    assert even.load.tolist() == [[0.25] * 4] * 2
    assert even.drop_fraction.max() == 0
    assert merge(graphdef, params)(tokens, Mode.TRAIN)[1].drop_fraction.max() > 0


def test_quality_is_read_from_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished comparison"):
        dense_baselines.read_quality(tmp_path, "nano")
    names = ("moe", "dense-active, same tokens", "dense-active, same wall", "dense-total, same tokens")
    arms = [{"arm": name, "mean": 1.0 + n} for n, name in enumerate(names)]
    (tmp_path / "comparison.json").write_text(json.dumps({"preset": "nano", "arms": arms}))
    assert dense_baselines.read_quality(tmp_path, "nano") == {"none": 1.0, "active": 2.0, "total": 4.0}
    with pytest.raises(UserError, match="a comparison of nano, not of story"):
        dense_baselines.read_quality(tmp_path, "story")


def test_a_picture_has_a_panel_for_each_quantity() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    models = {name: {"ms_per_step": 2.0, "mflops_per_token": 3.0} for name in ("moe", "dense-active", "dense-total")}
    assert [axes.get_title("left") for axes in dense_baselines.baselines_figure("nano", models).axes] == [
        "ms a training step",
        "MFLOP a token",
    ]
