"""What the suites of benchmark.py compute from their times, worked by hand. Nothing is timed and little is compiled."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.console import Console

from moe_jax.benchmarks import cost_table, decoding, dense_baselines, feeding, layer, saving, suites
from moe_jax.benchmarks.cost_table import CostTable
from moe_jax.benchmarks.request import BenchmarkRequest, print_numbers, times_table
from moe_jax.benchmarks.uniform_routing import UniformMoE
from moe_jax.config import ModelConfig, UserError
from moe_jax.data.batches import train_positions
from moe_jax.model.costs import Count
from moe_jax.model.moe.layer import MoE
from moe_jax.system import machine
from moe_jax.system.machine import Times
from tests.benchmarks.test_benchmarks import config


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def pretend(monkeypatch: pytest.MonkeyPatch, module: Any, seconds: dict[str, float]) -> list[Any]:
    """`alternate` runs nothing, and gives these seconds. Returns the rounds and options that were asked for."""
    asked: list[Any] = []

    def alternate(candidates: dict[str, Any], rounds: int, **options: Any) -> dict[str, Times]:
        asked.append((rounds, options) if options else rounds)
        return {name: Times((seconds[name],)) for name in candidates}

    monkeypatch.setattr(module, "alternate", alternate)
    return asked


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Two products: of 100 operations in 0.5 s, and of 900 in 3 s. So the machine does 300 a second."""
    monkeypatch.setattr(machine, "matmuls", lambda dtype: {"a": (print, 100), "b": (print, 900)})
    return {"a": 0.5, "b": 3.0}


@pytest.mark.parametrize(("rounds", "asked"), [(2, 3), (7, 3), (8, 4), (15, 7)])
def test_the_step_of_the_moe_suite(
    rounds: int, asked: int, products: dict[str, float], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 operations in 4 s are half of 300 a second."""
    monkeypatch.setattr(suites, "temporary_bytes", lambda *_: {"temp_bytes": 7})
    trainer = SimpleNamespace(active_flops=600)
    monkeypatch.setattr(suites.RandomTokenTrainer, "of", lambda *_, **__: trainer)
    turns = pretend(monkeypatch, suites, {"training step": 4.0, **products})
    found = suites._step_numbers(console, BenchmarkRequest(config(), 2, rounds))
    assert found == {"train_step_share_of_matmul_peak": 0.5, "temp_bytes": 7}
    assert turns == [asked]
    assert "2 x 16 tokens" in printed(console)


def test_the_decode_suite(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 bytes in 4 s: 500 a second. A token must read 1,000 bytes, so 2 s of its 8 are bound by memory."""
    monkeypatch.setattr(suites.machine, "memory_read_benchmark", lambda: (print, 2000))
    monkeypatch.setattr(suites, "create", lambda *_: None)
    monkeypatch.setattr(suites, "split", lambda _: (None, None))
    made: list[Any] = []
    fake = SimpleNamespace(
        Model=SimpleNamespace(of=lambda *_: None),
        token_call=lambda *_: made.append(1),
        DecodeLoop=lambda _, __, batch: made.append(batch),
        prefill_call=lambda _, __, length: made.append(("prefill", length)),
        uncached_call=lambda *_: None,
        active_bytes=lambda _: 1000,
    )
    monkeypatch.setattr(suites, "decoding", fake)
    seconds = {"memory read": 4.0, "decode, batch 1": 8.0, "decode, batch 8": 9.0, "decode, batch 32": 10.0}
    seconds |= {"prefill, 128 tokens": 11.0, "uncached forward, 4 tokens": 12.0}
    turns = pretend(monkeypatch, suites, seconds)
    monkeypatch.setattr(suites, "compare_weights", lambda *_: {"weights": {}})
    assert suites.decode(console, BenchmarkRequest(config(), 2, 5)) == {
        "weights": {},
        "decode_share_of_bandwidth_bound": 0.25,
        "decode_ms_per_token_batch1": 8000,
        "decode_ms_per_token_batch8": 9000,
        "decode_ms_per_token_batch32": 10_000,
        "prefill_128_ms": 11_000,
        "uncached_4_token_ms": 12_000,
        "memory_bytes_per_second": 500,
    }
    assert turns == [15]
    assert sorted(made, key=str) == [("prefill", 128), 1, 32, 8]


@pytest.mark.parametrize(("length", "position"), [(16, 8), (9, 4)])
def test_each_token_is_decoded_in_the_middle_of_the_context(
    length: int, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again at the same position. The stand-in answers with the position that it was asked for."""

    class State(NamedTuple):
        position: Any
        logits: Any

    monkeypatch.setattr(decoding, "prefill", lambda _, params, tokens, at: State(at + 0, tokens.shape[0] + 0 * at))
    monkeypatch.setattr(decoding, "advance", lambda _, params, state, token: State(state.position + 1, state.position))
    model: Any = SimpleNamespace(config=config(seq_len=length).model, graphdef=None)
    loop = decoding.DecodeLoop(model, {}, 3)
    assert int(loop._state.logits) == 3, "the prompts of a batch"
    assert [int(loop()) for _ in range(3)] == [position] * 3


@pytest.mark.parametrize(("length", "position", "tokens"), [(64, 32, 8), (9, 4, 5)])
def test_a_token_of_one_text_is_a_share_of_a_call(
    length: int, position: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call writes from T/2 on: eight tokens, or as many as the context has left. A call takes 80 s here."""

    class State(NamedTuple):
        position: Any

    asked: list[tuple[int, int]] = []

    def write(params: Any, state: State, settings: Any, key: Any, number: Any, count: Any, stop: Any) -> Any:
        asked.append((int(state.position), int(count)))
        return SimpleNamespace(state=State(state.position + count), tokens=np.zeros(8))

    stand_in = SimpleNamespace(prefill=lambda params, prompt, at: State(at), write=write)
    monkeypatch.setattr(decoding, "Decoder", lambda *_: stand_in)
    clock = iter(range(0, 1000, 80))
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model: Any = SimpleNamespace(config=config(seq_len=length).model, graphdef=None)
    call = decoding.token_call(model, {})
    assert [call(), call()] == [80 / tokens, 80 / tokens]
    assert asked == [(position, tokens)] * 2


@pytest.mark.parametrize(("rounds", "saves"), [(2, 1), (5, 1), (6, 2), (15, 5)])
def test_the_pipeline_suite(rounds: int, saves: int, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MB in 2 s, and a batch of 2 x 16 tokens in 4 s."""
    tokenizer = SimpleNamespace(encode_batch=print)
    monkeypatch.setattr(suites.feeding, "stories", lambda: (["text"] * 3, 4_000_000))
    monkeypatch.setattr(suites.feeding, "tokenizers", lambda: {"bytes": tokenizer, "BPE of 300": tokenizer})
    monkeypatch.setattr(suites.feeding, "batch_call", lambda *_: None)
    monkeypatch.setattr(suites.saving, "make_state", lambda _: "state")
    asked: list[Any] = []
    monkeypatch.setattr(suites.saving, "measure", lambda *given: asked.append(given) or {"restore_seconds": 1.5})
    seconds = {"tokenizing, bytes": 2.0, "tokenizing, BPE of 300": 8.0, "a batch of 2 x 16": 4.0}
    turns = pretend(monkeypatch, suites, seconds)
    assert suites.pipeline(console, BenchmarkRequest(config(), 2, rounds)) == {
        "tokenizing_bytes_MB_per_second": 2.0,
        "tokenizing_BPE_of_300_MB_per_second": 0.5,
        "batch_ms": 4000,
        "restore_seconds": 1.5,
    }
    assert turns == [rounds]
    assert (asked[0][0], asked[0][2]) == ("state", saves)
    text = printed(console)
    assert "left out: the tokenizer of GPT-2" in text
    assert "8 tokens/s" in text
    assert "2.0 MB/s" in text
    assert "3 stories of 4.0 MB" in text


@pytest.mark.parametrize("memory", [None, 10**15, 10**3])
def test_the_train_suite(
    memory: int | None, products: dict[str, float], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 4, 2 and 8 s; 300, 600 and 1,200 operations at 300 a second. All run in turn if memory holds them."""
    monkeypatch.setattr(cost_table, "compute", lambda *_: CostTable({"head": Count(1, 1, 1)}, {}, {}, 1.0))
    monkeypatch.setattr(cost_table, "formula", lambda model, batch: {"a": 1e6 * batch, "b": 5e5})
    monkeypatch.setattr(dense_baselines, "machine_memory", lambda: memory)
    flops, seconds = {"none": 300, "active": 600, "total": 1200}, {"none": 4.0, "active": 2.0, "total": 8.0}

    def of(given: Any, batch: int, moe: type[MoE]) -> Any:
        assert (batch, moe) == (2, UniformMoE)
        return SimpleNamespace(active_flops=flops[given.model.dense], seconds=seconds[given.model.dense])

    turns: list[tuple[list[float], int]] = []

    def alternate(candidates: dict[str, Any], rounds: int) -> dict[str, Times]:
        steps = {name: trainer.seconds for name, trainer in candidates.items() if name not in products}
        turns.append((list(steps.values()), rounds))
        return {name: Times((taken,)) for name, taken in {**steps, **products}.items()}

    monkeypatch.setattr(dense_baselines.RandomTokenTrainer, "of", of)
    monkeypatch.setattr(dense_baselines, "alternate", alternate)
    quality: Any = {"none": 0.9, "active": 1.0, "total": 0.8}
    found = dense_baselines.train(console, BenchmarkRequest(config(), 2, 9, quality, uniform_routing=True))
    assert turns == ([([4.0], 4), ([2.0], 4), ([8.0], 4)] if memory == 10**3 else [([4.0, 2.0, 8.0], 4)])
    assert found["tokens_per_second"] == 32 / 4
    assert found["share_of_matmul_peak"] == 0.25
    assert (found["wall_over_dense_active"], found["dense_total_over_wall"]) == (2, 2)
    assert found["models"]["dense-active"] == {"ms_per_step": 2000, "mflops_per_token": 2.5, "bits_per_byte": 1.0}
    without = dense_baselines.train(console, BenchmarkRequest(config(), 2, 2, uniform_routing=True))
    assert turns[-1][1] == 3
    assert "bits_per_byte" not in without["models"]["moe"]
    how = "one model after another" if memory == 10**3 else "all models in turn"
    for words in ("16 tokens/s", "dense, active parameters", "ms a training step", how):
        assert words in printed(console)


def test_the_cost_table_is_printed_with_its_differences(console: Console) -> None:
    parameters = {"head": Count(3_000_000, 2_000_000, 0), "rest": Count(1_194_304, 0, 0)}
    found = CostTable(parameters, {"head": 2e6, "ffn": 4e6}, {"head": 2.1e6, "ffn": 3.6e6}, 2.5)
    assert found.difference == pytest.approx(0.1)
    console.print(dense_baselines._cost_table(found))
    lines = [" ".join(line.replace("│", " ").split()) for line in printed(console).splitlines()]
    for line in ("in all 4,194,304 2,000,000 16.0", "head 2.00 2.10 +5.00%", "ffn 4.00 3.60 -10.00%"):
        assert line in lines
    assert "2.50 x" in printed(console)


def test_the_formulas_by_hand() -> None:
    """T 16 is one block of queries, which read 16 keys. D 16, V 60, L 2."""
    found = cost_table.formula(config().model, 2)
    assert found["attention"] == 2 * (6 * 4 * 16**2 + 6 * 2 * 16 * 16)
    assert found["head"] == 6 * 16 * 60
    grouped = cost_table.formula(config(heads=4, kv_heads=2, head_size=6).model, 2)  # qkv 16 x 48, out 24 x 16
    assert grouped["attention"] == 2 * (6 * (16 * 48 + 24 * 16) + 6 * 2 * 24 * 16)
    dense = cost_table.formula(config(dense="active").model, 2)
    assert dense["experts and router"] == 2 * 6 * 3 * 16 * 49  # an FFN as wide as two experts, and one for the router


@pytest.mark.parametrize(("changes", "shared"), [({}, 0), ({"shared_experts": 1}, 1)])
def test_all_experts_on_every_token_by_hand(
    changes: dict[str, int], shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = SimpleNamespace(flops_of=lambda scope: {"attention": 320, "ffn": 640, "head": 960}[scope])
    step = SimpleNamespace(compiled_step=lambda batch: SimpleNamespace(as_text=lambda: f"{batch} sequences"))
    monkeypatch.setattr(cost_table.Programs, "of", lambda *_, **__: step)
    monkeypatch.setattr(cost_table, "read_program", lambda text: program if text == "2 sequences" else None)
    found = cost_table.compute(config(**changes), 2)
    assert found.compiled == {"attention": 10, "experts and router": 20, "head": 30}
    parts = cost_table.formula(config(**changes).model, 2)
    every = 3 * 2 * ((4 + shared) * 2304 + 128)
    rest = parts["attention"] + parts["head"]
    assert found.all_experts == pytest.approx((rest + every) / (rest + parts["experts and router"]))
    assert found.all_experts > 1
    assert cost_table.compute(config(dense="active"), 2).all_experts == 1


def test_the_layer_suite(products: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """MoE in 6 s, without drops in 9; the plain dense layout in 4, the best in 3; all experts in 12; 8 and 64 experts
    in 5 and 10."""
    seconds = {"dense, plain": 4.0, "dense, flat": 3.0, "dense, our matmul": 5.0, **products}
    monkeypatch.setattr(layer, "dense_layouts", lambda _: {n: (print, None) for n in seconds if "dense" in n})
    seconds |= {"MoE": 6.0, "MoE, no drops": 9.0, "all experts": 12.0, "8 experts": 5.0, "64 experts": 10.0}
    turns = pretend(monkeypatch, layer, seconds)
    monkeypatch.setattr(layer, "compiled_flops", lambda *operands: 1000 * len(operands))
    monkeypatch.setattr(layer, "with_reused_output", lambda *_: None)
    asked: list[tuple[str, int, str]] = []

    def layer_function(model: ModelConfig, moe: type) -> tuple[Any, None]:
        asked.append((model.routing.dispatch, model.experts, moe.__name__))
        return print, None

    monkeypatch.setattr(layer, "layer_function", layer_function)
    numbers, times = layer.benchmark_layer(config().model, 9)
    own = config().model.experts
    assert asked == [
        ("capacity", own, "MoE"),
        ("blocks", own, "MoE"),
        ("capacity", own, "AllExpertsMoE"),
        ("capacity", 8, "MoE"),
        ("capacity", 64, "MoE"),
    ]
    tokens, bound = 8 * 16, layer.bound_flops(config().model, 8)
    assert numbers == {
        "flops_over_bound_forward": pytest.approx(3000 / bound),
        "flops_over_bound_grad": pytest.approx(4000 / bound / 3),
        "wall_over_dense_active": 1.5,
        "wall_over_best_dense": 2.0,
        "dropless_wall_over_best_dense": 3.0,
        "dropless_flops_over_ideal": pytest.approx(4000 / (3 * layer.active_flops(config().model, tokens))),
        "dense_all_over_wall": 2.0,
        "wall_growth_8_to_64_experts": 2.0,
        "layer_share_of_matmul_peak": pytest.approx(3 * layer.active_flops(config().model, tokens) / 6 / 300),
        "matmul_flops_per_second": 300,
    }
    assert turns == [9]
    assert set(times) == set(seconds)


def test_saving_is_measured_in_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of three rounds the plain write takes 1 s more, and so on: medians are those of round 2."""
    clock = iter([1, 2, 10, 1, 4, 2, 3, 20, 4, 5, 9, 9, 90, 9, 9])
    order: list[int] = []

    def clocked(work: Any) -> float:
        work()
        order.append(next(clock))
        return float(order[-1])

    monkeypatch.setattr(saving, "_clocked", clocked)
    state = {"params": {"w": np.zeros((250, 100), np.float32)}}
    found = saving.measure(state, tmp_path, 3)
    assert (found["disk_seconds"], found["orbax_seconds"], found["save_seconds"]) == (2, 3, 20)
    assert (found["verification_seconds"], found["restore_seconds"]) == (4, 5)
    assert found["verification_percent"] == 10  # the median of 1 of 10, 4 of 20 and 9 of 90
    assert found["disk_GB"] == 1e-4
    assert found["disk_seconds_per_GB"] == 2e4
    assert found["save_GB"] > 2e-4, "arrays, and once more as safetensors"
    assert list(tmp_path.glob("**/*.safetensors")) == []


def test_uniform_routing_is_a_choice() -> None:
    assert BenchmarkRequest(config(), 2, 1).moe is MoE
    assert BenchmarkRequest(config(), 2, 1, uniform_routing=True).moe is UniformMoE


def test_times_are_printed_in_milliseconds(console: Console) -> None:
    console.print(times_table("t", {"a": Times((1.0, 2.0, 3.0, 4.0))}))
    console.print(times_table("t", {"a": Times((1.5,))}, lambda name, t: f"{name} {t.median}"))
    print_numbers(console, {"share": 0.123456, "bytes": 1234567})
    text = printed(console)
    for words in ("2,500.00", "60%", "1,500.00", "a 1.5", "0.1235", "1,234,567"):
        assert words in text


def test_the_tokenizers_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = dataclasses.replace(feeding.CORPUS, vocab_size=300, stories=20)
    monkeypatch.setattr(feeding, "CORPUS", corpus)
    true = feeding.train_tokenizer

    def without_gpt2(data: Any, corpus: Any) -> Any:
        if data.tokenizer == "gpt2":
            raise UserError("no network")
        return true(data, corpus)

    monkeypatch.setattr(feeding, "train_tokenizer", without_gpt2)
    assert list(feeding.tokenizers()) == ["bytes", "BPE of 300"]
    monkeypatch.setattr(feeding, "train_tokenizer", lambda data, _: data.tokenizer)
    assert feeding.tokenizers() == {"bytes": "byte", "BPE of 300": "bpe", "GPT-2": "gpt2"}
    texts, size = feeding.stories()
    assert (len(texts), size) == (20, sum(len(text.encode()) for text in texts))


def test_batches_are_those_of_the_next_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "STREAM", 500)
    call = feeding.batch_call(config(), 3)
    tokens = np.random.default_rng(0).integers(0, 60, 500).astype(np.uint16)
    for step in (0, 1):
        expected = tokens[train_positions(500, seed=0, step=step, batch_size=3, seq_len=16)]
        np.testing.assert_array_equal(call(), expected)


def test_a_comparison_that_is_not_finished_has_no_quality(tmp_path: Path) -> None:
    arms = [{"arm": "moe", "mean": 1.0}]
    for text in ("", "[]", "{}", json.dumps({"preset": "nano", "arms": arms}), json.dumps({"preset": 1, "arms": 7})):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(
            UserError, match=r"no finished comparison there; `uv run python benchmarks/compare.py --preset nano"
        ):
            dense_baselines.read_quality(tmp_path, "nano")
