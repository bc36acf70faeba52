"""The parts of a plan that need no compiler for a GPU: targets, bounds, candidates, verdicts."""

import dataclasses
import os
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RunConfig, TrainConfig, UserError
from moe_jax.model.costs import adapter_parameters, count_parameters, totals
from moe_jax.planning import device_memory, search
from moe_jax.planning.device_memory import Bound, Memory
from moe_jax.planning.plan_cache import looked_up
from moe_jax.planning.roofline import Rates
from moe_jax.planning.target import Target, load_target
from moe_jax.system.environment import MIB
from tests.support import tiny

RATES = Rates(1e11, 1e12, 2e12, 4e12)
CONFIG = RunConfig(model=tiny.config(), train=TrainConfig(batch_size=4, grad_accum=2, optimizer="adamw"))


def target(capability: str = "8.6", memory: int = 2**30) -> Target:
    major, minor = capability.split(".")
    text = f"gpu {{ device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: {minor} }} }}"
    text += " core_count: 10 fpus_per_core: 100 clock_rate_ghz: 1.5 memory_bandwidth: 100000000000"
    return Target("card", f'{text}\ndevice_description_str: "A card 1"')


def memory(total: float, warned: bool = False) -> Memory:
    return Memory(total / 2, total / 4, total / 4, warned)


# Targets


def test_the_fields_of_a_target() -> None:
    found = target("7.5", 1234)
    assert (found.memory, found.compute_capability, found.device_kind, found.platform) == (
        1234,
        "7.5",
        "A card 1",
        "gpu",
    )
    assert target(memory=2**30).budget == 0.85 * 0.75 * 1024
    with pytest.raises(UserError, match="target empty: its description has no device_memory_size"):
        _ = Target("empty", "major: 7").memory
    assert Target("x", 'major: "9"').text == 'major: "9"'


def test_the_compute_capability_is_read_from_its_own_block() -> None:
    """The text leaves out a minor number of 0, and cuDNN's version has a major and a minor number too."""
    cudnn = "dnn_version_info { major: 9 minor: 10 }"
    assert Target("a100", f"{cudnn} cuda_compute_capability {{ major: 8 }} {cudnn}").compute_capability == "8.0"
    assert Target("b200", f"cuda_compute_capability {{\n  major: 10\n}}\n{cudnn}").compute_capability == "10.0"
    for text in (cudnn, f"cuda_compute_capability {{ minor: 5 }} {cudnn}"):
        with pytest.raises(UserError, match=r"^--gpu x: its description has no cuda_compute_capability; the files in "):
            _ = Target("x", text).compute_capability


def test_a_target_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert load_target("rtx3050-4gb").name == "rtx3050-4gb"
    (tmp_path / "own.txtpb").write_text("text é", encoding="utf-8")
    assert load_target(str(tmp_path / "own.txtpb")) == Target("own", "text é")
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(UserError, match=rf"^--gpu {tmp_path}/bad: is not UTF-8"):
        load_target(str(tmp_path / "bad"))
    with pytest.raises(FileNotFoundError):
        load_target(str(tmp_path / "gone"))


# Bounds


def test_memory_is_the_sum_of_its_parts() -> None:
    assert Memory(1, 2, 4, False).total == 7


def test_a_bound_that_equals_the_budget_fits() -> None:
    card = target()
    assert Bound({"a": memory(card.budget), "b": memory(1)}).fits(card)
    assert not Bound({"a": memory(card.budget + 0.01), "b": memory(1)}).fits(card)
    assert not Bound({"a": memory(1), "b": memory(1, warned=True)}).fits(card)


@pytest.mark.parametrize(
    ("capability", "back_ends"), [("7.5", ["cublas"]), ("8.0", ["triton", "cublas"]), ("12.0", ["triton", "cublas"])]
)
def test_older_cards_have_one_back_end(capability: str, back_ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(device_memory, "lower_for", lambda *_: "lowered")
    monkeypatch.setattr(device_memory, "_measured", lambda *given: asked.append(given[1:]) or memory(1))
    assert list(device_memory.bound(target(capability), None).back_ends) == back_ends
    options = {"triton": {}, "cublas": {"xla_gpu_enable_triton_gemm": False}}
    assert asked == [("lowered", options[name]) for name in back_ends]


def compiled(text: str, said: str = "") -> Any:
    """A lowered program, whose compilation writes `said` to the stderr of the process."""
    sizes = {"argument_size_in_bytes": 8, "output_size_in_bytes": 6, "alias_size_in_bytes": 4, "temp_size_in_bytes": 1}
    analysis = SimpleNamespace(**{name: size * MIB for name, size in sizes.items()})

    def compile_(compiler_options: dict[str, bool]) -> Any:
        os.write(2, said.encode())
        return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: analysis)

    return SimpleNamespace(compile=compile_)


def test_memory_is_read_from_the_compiled_program(capfd: pytest.CaptureFixture[str]) -> None:
    """Outputs that take the memory of a donated argument do not count."""
    found = device_memory._compile(compiled("operation_queue_id"), {}, RATES)
    assert found == Memory(8, 2, 1, warned=False)
    warned = device_memory._compile(compiled("operation_queue_id", "W Can't reduce memory use below 7"), {}, RATES)
    assert warned == Memory(8, 2, 1, warned=True)
    assert capfd.readouterr().err == "", "what the compiler says is collected, and not shown"
    os.write(2, b"afterwards")
    assert capfd.readouterr().err == "afterwards"
    with pytest.raises(AssertionError, match="compiled for the CPU"):
        device_memory._compile(compiled("other"), {}, RATES)


@pytest.mark.parametrize("cause", ["No PTX compilation provider", "libdevice not found at"])
def test_missing_ptxas_is_named(cause: str) -> None:
    def refuse(text: str) -> Any:
        def compile_(compiler_options: Any) -> None:
            raise jax.errors.JaxRuntimeError(text)

        return SimpleNamespace(compile=compile_)

    with pytest.raises(UserError, match="planning needs ptxas"):
        device_memory._compile(refuse(f"INTERNAL: {cause} here"), {}, RATES)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        device_memory._compile(refuse("another"), {}, RATES)


def test_without_the_plugin_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "has_cuda_plugin", lambda: False)
    with pytest.raises(UserError, match=r"planning needs JAX's CUDA plugin: .*--extra gpu-plan"):
        device_memory.lower_for(target(), jax.jit(jnp.sin), jnp.zeros(3))


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans").write_text("a file")
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(device_memory, "_compile", lambda *_: memory(7))
    lowered: Any = SimpleNamespace(as_text=lambda: "program")
    assert device_memory._measured(target(), lowered, {}) == memory(7)


# Candidates


def settings(config: RunConfig, every: bool = False) -> list[tuple[str, bool, int, int]]:
    found = search.candidates(config, every)
    return [(c.train.optimizer, c.execution.remat, c.train.batch_size, c.train.grad_accum) for c in found]


def with_train(**changes: Any) -> RunConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


ACCUMULATED = [("adafactor", True, 4, 2), ("adafactor", True, 2, 4), ("adafactor", True, 1, 8)]


def test_remat_comes_before_a_leaner_optimizer_and_accumulation_last() -> None:
    kinds = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
    assert settings(CONFIG) == [(k, remat, 8, 1) for k in kinds for remat in (False, True)] + ACCUMULATED
    assert settings(with_train(optimizer="adafactor"))[:2] == [("adafactor", False, 8, 1), ("adafactor", True, 8, 1)]


def test_a_run_with_remat_keeps_it() -> None:
    config = dataclasses.replace(CONFIG, execution=dataclasses.replace(CONFIG.execution, remat=True))
    assert all(remat for _, remat, _, _ in settings(config))
    assert len(settings(config)) == 4 + 3


def test_an_optimizer_that_is_not_in_the_order_comes_first() -> None:
    found = [kind for kind, remat, *_ in settings(with_train(optimizer="muon")) if not remat]
    assert found == ["muon", "adamw", "adamw-bf16", "adamw-8bit", "adafactor"]


def test_every_optimizer_is_tried_with_the_runs_own_first() -> None:
    found = [kind for kind, remat, *_ in settings(with_train(optimizer="adamw-8bit"), every=True) if not remat]
    assert found == ["adamw-8bit", "adamw", "adamw-bf16", "adafactor"]


@pytest.mark.parametrize(("batch", "micro"), [(1, []), (6, [3]), (7, []), (8, [4, 2, 1])])
def test_a_batch_is_halved_as_long_as_it_is_even(batch: int, micro: list[int]) -> None:
    found = [size for _, _, size, accum in settings(with_train(batch_size=batch, grad_accum=1)) if accum > 1]
    assert found == micro


# Verdicts


def row(total: float, fits: bool, config: RunConfig = CONFIG) -> search.Row:
    return search.Row(config, "bfloat16", 8, 4, Bound({"cublas": memory(total)}), fits, "cuDNN's")


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    found = {"evaluation": 10.0, "prefill": 20.0}
    monkeypatch.setattr(search, "plan_inference", lambda config, target: found)
    return found


def test_the_first_that_fits_or_else_the_leanest(between: dict[str, float]) -> None:
    card = target()
    assert search.verdict([row(900, False), row(300, True), row(200, True)], card).total == 300
    nothing = search.verdict([row(900, False), row(800, False), row(850, False)], card)
    assert (nothing.total, nothing.fits) == (800, False)


def test_what_runs_between_the_steps_must_fit_too(between: dict[str, float]) -> None:
    card = target()
    for largest, fits in ((card.budget, True), (card.budget + 1, False)):
        between["prefill"] = largest
        found = search.verdict([row(300, True)], card)
        assert (found.total, found.fits) == (largest, fits)
    assert search.verdict([row(300, True)], card).summary(card) == {
        "preset": CONFIG.preset,
        "gpu": "card",
        "precision": "bfloat16",
        "total_mib": round(card.budget + 1, 1),
        "budget_mib": 652.8,
        "fits": False,
        "micro_batch": 4,
        "grad_accum": 2,
        "remat": False,
        "optimizer": "adamw",
        "lora_rank": 0,
        "param_dtype": "float32",
        "compute_dtype": "bfloat16",
        "kernels": None,
        "traffic_gb": None,
        "predicted_step_ms": None,
        "predicted_tokens_per_second": None,
    }


@pytest.mark.parametrize(("every", "fit_at", "tried"), [(False, 0, 1), (False, 3, 4), (False, 99, 11), (True, 0, 8)])
def test_a_search_stops_at_the_first_that_fits(
    every: bool, fit_at: int, tried: int, between: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[RunConfig] = []

    def plan(config: RunConfig, _: Target) -> search.Row:
        steps.append(config)
        return row(1, len(steps) > fit_at, config)

    monkeypatch.setattr(search, "plan_step", plan)
    assert len(list(search.search(CONFIG, target(), every))) == len(steps) == tried


@pytest.mark.parametrize("every", [False, True])
def test_a_setting_whose_evaluation_does_not_fit_is_not_the_last_one(
    every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step fits. Between the steps, only the second setting and those after it do."""
    card, evaluated = target(), list[RunConfig]()

    def inference(config: RunConfig, _: Target) -> dict[str, float]:
        evaluated.append(config)
        return {"evaluation": card.budget + 1 if len(evaluated) == 1 else 20.0}

    monkeypatch.setattr(search, "plan_step", lambda config, target: row(300, True, config))
    monkeypatch.setattr(search, "plan_inference", inference)
    rows = list(search.search(CONFIG, card, every))
    found = search.verdict(rows, card)
    assert (len(rows), found.row, found.total, found.fits) == (8 if every else 2, rows[1], 300, True)
    assert evaluated == [row.config for row in rows[:2]], "each at most once"


def test_where_nothing_fits_between_the_steps_the_first_setting_is_shown(between: dict[str, float]) -> None:
    card = target()
    between["prefill"] = card.budget + 1
    rows = [row(900, False), row(300, True), row(200, True)]
    found = search.verdict(rows, card)
    assert (found.row, found.fits) == (rows[1], False)


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every program takes 100 MiB. Returns the arguments of each."""
    asked: list[Any] = []

    def bound(_: Target, program: Any, *arguments: Any) -> Bound:
        asked.append(arguments)
        return Bound({"cublas": memory(100)})

    monkeypatch.setattr(search, "bound", bound)
    return asked


def test_a_step_is_planned_with_its_batch(bounds: list[Any]) -> None:
    """AdamW has two float32 numbers for each parameter."""
    found = search.plan_step(CONFIG, target())
    assert (found.precision, found.weight_bytes, found.fits) == ("bfloat16", 4, True)
    assert found.state_bytes == pytest.approx(8, abs=0.1)
    ((_, tokens),) = bounds
    assert (tokens.shape, tokens.dtype) == ((2, 4, 9), jnp.int32)
    assert not search.plan_step(CONFIG, target(memory=2**20)).fits


def test_between_the_steps_the_optimizers_state_stays(bounds: list[Any]) -> None:
    found = search.plan_inference(CONFIG, target())
    assert list(found) == ["evaluation", "prefill", "decoding"]
    state = sum(x.size * 4 for x in jax.tree.leaves(tiny.build(CONFIG.model)[1])) * 2 / MIB
    for total in found.values():
        assert total - 100 == pytest.approx(state, rel=0.02)
    evaluation, prefill, decoding = bounds
    assert evaluation[1].shape[1] == CONFIG.model.seq_len
    assert (prefill[1].shape, prefill[2].shape) == ((1, 8), ())
    assert (decoding[1].position.shape, len(decoding)) == ((), 7), "the loop of several tokens"


def test_adapters_are_planned_with_their_state_and_a_masked_batch(bounds: list[Any]) -> None:
    """The optimizer has two numbers for each adapter. Between the steps the merged weights are beside the others."""
    config = search.with_adapters(CONFIG, 4)
    found = search.plan_step(config, target())
    adapters, whole = adapter_parameters(config).total, totals(count_parameters(config.model)).total
    assert found.state_bytes == pytest.approx(8 * adapters / whole, rel=0.01)
    ((state, batch),) = bounds
    assert sum(x.size for x in jax.tree.leaves(state.adapters)) == adapters
    assert (batch.tokens.shape, batch.weights.shape) == ((2, 4, 9), (2, 4, 8))
    waiting = (4 * whole + 4 * adapters + 8 * adapters) / MIB
    for total in search.plan_inference(config, target()).values():
        assert total - 100 == pytest.approx(waiting, rel=0.01)


def test_with_adapters_the_frozen_weights_become_leaner(bounds: list[Any]) -> None:
    """Not the optimizer. Accumulation is last, and a rank beside bfloat16 weights has nothing to try twice."""
    config = search.with_adapters(CONFIG, 4)
    tried = [
        (c.train.param_dtype, c.execution.remat, c.train.batch_size, c.train.grad_accum, c.train.optimizer)
        for c in search.candidates(config, every_optimizer=False)
    ]
    whole = CONFIG.train.batch_size * CONFIG.train.grad_accum
    first = [(dtype, remat, whole, 1, "adamw") for dtype in ("float32", "bfloat16") for remat in (False, True)]
    assert tried[:4] == first
    assert {(dtype, remat, kind) for dtype, remat, _, _, kind in tried[4:]} == {("bfloat16", True, "adamw")}
    assert [(micro, accum) for _, _, micro, accum, _ in tried[4:]] == [
        (whole // 2**n, 2**n) for n in range(1, len(tried) - 3)
    ]
    lean = dataclasses.replace(config, train=dataclasses.replace(config.train, param_dtype="bfloat16"))
    assert len(list(search.candidates(lean, every_optimizer=False))) == len(tried) - 2


def test_sizes_are_in_mebibytes() -> None:
    assert search._size({"a": np.zeros(2**18, np.float32), "b": np.zeros(2**19, np.float16)}) == 2


@pytest.mark.parametrize("damage", [zlib.error("incorrect data check"), EOFError(), AttributeError("a list")])
def test_a_damaged_file_of_the_cache_is_made_again(
    damage: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its reader says of it."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))

    def refuse(_: dict[str, Any]) -> int:
        raise damage

    assert looked_up(["a"], lambda: 1, lambda n: {"n": n}, refuse) == 1
    assert looked_up(["a"], lambda: 2, lambda n: {"n": n}, refuse) == 2
    assert looked_up(["a"], lambda: 3, lambda n: {"n": n}, lambda kept: kept["n"]) == 2
