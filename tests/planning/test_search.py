"""`plan`: which settings are tried, and which is chosen. The tests with the marker `plan` compile for real cards.

They need the extra `gpu-plan`: `uv run --extra gpu-plan pytest -m plan`.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.cli.train import Train
from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.model.costs import adapter_parameters, count_parameters, totals
from moe_jax.planning import search
from moe_jax.planning.device_memory import Bound
from moe_jax.planning.target import Target, load_target
from moe_jax.system import environment
from moe_jax.system.environment import MIB
from moe_jax.training.programs import Programs
from tests.planning.invented import memory, target
from tests.support import short_form, tiny
from tests.support.programs import compiled_for_gpu

CONFIG = RunConfig(model=tiny.config(), train=TrainConfig(batch_size=4, grad_accum=2, optimizer="adamw"))

# Candidates


def settings(config: RunConfig) -> list[tuple[str, bool, int, int]]:
    tried = search.candidates(config)
    return [(c.train.optimizer, c.execution.remat, c.train.batch_size, c.train.grad_accum) for c in tried]


def with_train(**changes: Any) -> RunConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


ACCUMULATED = [("adafactor", True, 4, 2), ("adafactor", True, 2, 4), ("adafactor", True, 1, 8)]


def test_remat_comes_before_a_leaner_optimizer_and_accumulation_last() -> None:
    kinds = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
    assert settings(CONFIG) == [(k, remat, 8, 1) for k in kinds for remat in (False, True)] + ACCUMULATED
    muon = [kind for kind, remat, *_ in settings(with_train(optimizer="muon")) if not remat]
    assert muon == ["muon", *kinds]
    assert settings(with_train(optimizer="adafactor"))[:2] == [("adafactor", False, 8, 1), ("adafactor", True, 8, 1)]


@pytest.mark.parametrize(("batch", "micro"), [(1, []), (6, [3]), (8, [4, 2, 1])])
def test_a_batch_is_halved_as_long_as_it_is_even_and_remat_is_kept(batch: int, micro: list[int]) -> None:
    config = with_train(batch_size=batch, grad_accum=1)
    assert [size for _, _, size, accum in settings(config) if accum > 1] == micro
    config = dataclasses.replace(config, execution=dataclasses.replace(CONFIG.execution, remat=True))
    assert all(remat for _, remat, _, _ in settings(config))
    assert len(settings(config)) == 4 + len(micro)


def test_with_adapters_the_frozen_weights_become_leaner() -> None:
    """Not the optimizer. Accumulation is last, and a rank beside bfloat16 weights has nothing to try twice."""
    config = search.with_adapters(CONFIG, 4)
    tried = [
        (c.train.param_dtype, c.execution.remat, c.train.batch_size, c.train.grad_accum, c.train.optimizer)
        for c in search.candidates(config)
    ]
    whole = CONFIG.train.batch_size * CONFIG.train.grad_accum
    first = [(dtype, remat, whole, 1, "adamw") for dtype in ("float32", "bfloat16") for remat in (False, True)]
    assert tried[:4] == first
    assert {(dtype, remat, kind) for dtype, remat, _, _, kind in tried[4:]} == {("bfloat16", True, "adamw")}
    assert [(micro, accum) for _, _, micro, accum, _ in tried[4:]] == [
        (whole // 2**n, 2**n) for n in range(1, len(tried) - 3)
    ]
    lean = dataclasses.replace(config, train=dataclasses.replace(config.train, param_dtype="bfloat16"))
    assert len(list(search.candidates(lean))) == len(tried) - 2


def test_a_setting_in_a_few_words() -> None:
    remat = dataclasses.replace(with_train(batch_size=4, grad_accum=2), execution=ExecutionConfig(remat=True))
    assert search._named(with_train(batch_size=8, grad_accum=1)) == "adamw"
    assert search._named(remat) == "adamw with remat, 4 x 2 sequences"


# Verdicts


def plan(total: float, step_fits: bool, config: RunConfig = CONFIG) -> search.Plan:
    return search.Plan(config, "bfloat16", 8, 4, Bound({"cublas": memory(total)}), step_fits, "cuDNN's")


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    programs = {"evaluation": 10.0, "prefill": 20.0}
    monkeypatch.setattr(search, "plan_inference", lambda config, target: programs)
    return programs


@pytest.mark.parametrize(("over", "fits"), [(0, True), (1, False)])
def test_what_runs_between_the_steps_must_fit_too(over: int, fits: bool, between: dict[str, float]) -> None:
    card = target()
    between["prefill"] = card.budget + over
    chosen = search.verdict([plan(900, False), plan(300, True), plan(200, True)], card)
    assert (chosen.step.total, chosen.total, chosen.fits(card)) == (300, card.budget + over, fits)
    leanest = search.verdict([plan(900, False), plan(800, False), plan(850, False)], card)
    assert (leanest.step.total, leanest.fits(card)) == (800, False)
    summary = chosen.summary(card)
    assert (summary["total_mib"], summary["fits"], summary["micro_batch"]) == (round(card.budget + over, 1), fits, 4)


def test_a_search_ends_at_the_first_setting_whose_programs_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step fits from the third on. Between the steps, only the fourth setting and those after it do."""
    card, steps, evaluated = target(), list[RunConfig](), list[RunConfig]()

    def step(config: RunConfig, _: Target) -> search.Plan:
        steps.append(config)
        return plan(300, len(steps) >= 3, config)

    def inference(config: RunConfig, _: Target) -> dict[str, float]:
        evaluated.append(config)
        return {"evaluation": card.budget + 1 if len(evaluated) == 1 else 20.0}

    monkeypatch.setattr(search, "plan_step", step)
    monkeypatch.setattr(search, "plan_inference", inference)
    plans = list(search.search(CONFIG, card))
    assert (len(plans), evaluated) == (4, steps[2:])
    assert search.verdict(plans, card) == plans[-1]


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
    assert (found.precision, found.weight_bytes, found.step_fits) == ("bfloat16", 4, True)
    assert found.state_bytes == pytest.approx(8, abs=0.1)
    ((_, tokens),) = bounds
    assert (tokens.shape, tokens.dtype) == ((2, 4, 9), jnp.int32)
    assert not search.plan_step(CONFIG, target(memory=2**20)).step_fits


def test_between_the_steps_the_optimizers_state_stays(bounds: list[Any]) -> None:
    found = search.plan_inference(CONFIG, target())
    assert list(found) == ["evaluation", "prefill", "decoding"]
    state = sum(x.size * 4 for x in jax.tree.leaves(tiny.build(CONFIG.model)[1])) * 2 / MIB
    for total in found.values():
        assert total - 100 == pytest.approx(state, rel=0.02)
    evaluation, prefill, decoding = bounds
    assert evaluation[1].shape[1] == CONFIG.model.seq_len
    assert (prefill[1].shape, prefill[2].shape) == ((1, 8), ())
    assert (decoding[1].position.shape, len(decoding)) == ((1,), 4), "the loop of several tokens"


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


@pytest.mark.parametrize(
    ("mesh", "topology"),
    [("data=1", "1x1x1"), ("expert=4", "1x1x4"), ("data=8", "1x1x8"), ("data=4,expert=4", "1x2x8")],
)
def test_the_cards_of_a_mesh_are_described_by_machines_of_eight(
    mesh: str, topology: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mesh of one card has the program for one device."""
    one = mesh == "data=1"
    described, taken = list[str](), list[Any]()
    step = SimpleNamespace(lower=lambda *given: ("for the mesh", *given))
    programs = SimpleNamespace(layout=None if one else "a layout", step=step, state_shapes="state", batch_shapes=max)
    monkeypatch.setattr(search, "gpu_devices", lambda _, topology: described.append(topology) or ["cards"])
    monkeypatch.setattr(search, "mesh_of", lambda text, devices: (text, devices))
    monkeypatch.setattr(search.Programs, "of", lambda *_, mesh: taken.append(mesh) or programs)
    monkeypatch.setattr(search, "lower_for", lambda _, program, *given: ("for one", *given))
    monkeypatch.setattr(search, "measured", lambda *given: taken.append(given[1:]) or memory(7))
    config = CONFIG.on_mesh(mesh, 2)
    assert search.mesh_memory(config, target()) == memory(7)
    assert described == [topology]
    batch = max(config.train.batch_size, config.train.grad_accum)
    count = config.train.batch_size // 2
    lowered = ("for one" if one else "for the mesh", "state", batch)
    assert taken == [(mesh, ["cards"]), (lowered, {}, f"{count} cards, {mesh}")]


# The command


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """A compiler that says 100 MiB for every program between steps, and for a step 600 MiB a byte of state."""
    steps: list[TrainConfig] = []

    def step(config: RunConfig, target: Target) -> search.Plan:
        steps.append(config.train)
        state = {"adamw": 8, "adamw-bf16": 6, "adamw-8bit": 2, "adafactor": 0}[config.train.optimizer]
        taken = Bound({"cublas": memory(600 * state + (2000 if not config.execution.remat else 100))})
        return search.Plan(config, "float16", state, 4, taken, taken.fits(target), "cuDNN's")

    monkeypatch.setattr(search, "plan_step", step)
    monkeypatch.setattr(search, "plan_inference", lambda config, target: {"evaluation": 100.0})
    monkeypatch.setattr(environment, "prepare_environment", list)
    return steps


def test_the_command_stops_at_the_first_setting_that_fits(
    pretended: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """8 and 6 bytes of state are too many; 2 x 600 + 100 = 1,300 MiB with remat fits."""
    assert main(run_command, ["plan", "--gpu", "quadro-t1000-4gb"]) == 0
    assert len(pretended) == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == (
        "uv run --extra cuda12 train.py --preset=seed-158m --batch-size=32 --grad-accum=1 --optimizer=adamw-8bit "
        "--execution.remat"
    )
    result = json.loads(lines[-1])
    assert result["command"] == lines[-2]
    assert (result["total_mib"], result["fits"], result["micro_batch"]) == (1300.0, True, 32)
    assert (result["optimizer"], result["remat"], result["gpu"]) == ("adamw-8bit", True, "quadro-t1000-4gb")


def test_adapters_are_planned_beside_frozen_weights_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, pretended: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed command repeats what the plan took: here 500 MiB a byte of a weight, so bfloat16 without remat."""

    def step(config: RunConfig, target: Target) -> search.Plan:
        width = 2 if config.train.param_dtype == "bfloat16" else 4
        taken = Bound({"cublas": memory(500 * width + 1000)})
        return search.Plan(config, "bfloat16", 0, width, taken, taken.fits(target), "cuDNN's")

    monkeypatch.setattr(search, "plan_step", step)
    assert main(run_command, ["plan", "--preset", "seed-158m", "--lora", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(
        "uv run --extra cuda12 python -m moe_jax sft --run RUN --data CHATS.jsonl --out NEW --batch-size="
    )
    assert lines[-2].endswith("--optimizer=adamw --lora=16 --train.param-dtype=bfloat16")
    assert json.loads(lines[-1])["param_dtype"] == "bfloat16"


def test_the_command_fails_where_nothing_fits(
    pretended: list[TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.txtpb"
    small.write_text(load_target("rtx3050-4gb").text.replace("3951369912", "99999999"))
    assert main(run_command, ["plan", "--gpu", str(small)]) == 1
    assert len(pretended) == 2 * 4 + 5, "four optimizers with and without remat, then 16, 8, 4, 2 and 1 sequences"
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["fits"], result["command"]) == (False, None)


def test_the_settings_of_train_py_are_planned(
    pretended: list[TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed command repeats its flags, and `train.py` then has the settings that were planned."""
    given = [
        "--seq-len",
        "128",
        "--lr",
        "1e-3",
        "--model.layers",
        "4",
        "--set",
        "model.bias=false",
        "--batch-size",
        "6",
    ]
    assert main(run_command, ["plan", *given, "--optimizer", "adafactor", "--execution.remat"]) == 0
    command = capsys.readouterr().out.splitlines()[-2]
    assert command == (
        "uv run --extra cuda12 train.py --preset=seed-158m --seq-len=128 --lr=0.001 --model.layers=4 "
        "--set=model.bias=false --batch-size=48 --grad-accum=1 --optimizer=adafactor --execution.remat"
    )
    trained = Train.parse([*command.split()[5:], "--out", str(tmp_path / "run")]).settings.config
    assert (trained.model.seq_len, trained.model.layers, trained.model.bias) == (128, 4, False)
    assert trained.train == pretended[-1]


def test_a_mesh_is_planned_with_the_sequences_of_each_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[RunConfig] = []
    monkeypatch.setattr(environment, "prepare_environment", list)
    monkeypatch.setattr(search, "mesh_memory", lambda config, target: planned.append(config) or memory(1000))
    assert main(run_command, ["plan", "--mesh", "expert=4", "--gpu", "rtx3060-12gb", "--optimizer", "adafactor"]) == 0
    (config,) = planned
    assert (config.execution.mesh, config.train.batch_size, config.train.grad_accum) == ("expert=4", 128, 1)
    *_, command, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["total_mib"], result["fits"], result["micro_batch"]) == (1000.0, True, 128)
    assert command == result["command"]
    assert " --batch-size=128 --grad-accum=1 --optimizer=adafactor --mesh=expert=4" in command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "rtx9090"], "--gpu rtx9090: must be one of h100-80gb, quadro-t1000-4gb, rtx3050-4gb"),
        (["--data", "stories"], "--data: no such flag"),
        (["--mesh", "data=9"], "--mesh data=9: has 9 places; give at most 8, or a multiple"),
        (["--mesh", "data=2", "--lora", "4"], "--lora 4: is for a plan of one GPU"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, pretended: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_command, ["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert pretended == []


# Compiled for described cards


def compiled(name: str, gpu: str, **train: Any) -> search.Plan:
    """The training step of a preset with remat, and `train` in place of its own settings, on a card."""
    config = with_vocabulary(preset(name))
    train_config = dataclasses.replace(config.train, **train)
    config = dataclasses.replace(config, train=train_config, execution=ExecutionConfig(remat=True))
    return search.plan_step(config, load_target(gpu))


ON_4_GB = [
    ("rtx3050-4gb", "adamw-bf16", "bfloat16", 2402),
    # Float32: no tensor cores. Two numbers of 8 bits of state, because activations take twice as much.
    ("quadro-t1000-4gb", "adamw-8bit", "float32", 2402),
    ("rtx3050-4gb", "adafactor", "bfloat16", 1160),
    ("quadro-t1000-4gb", "adafactor", "float32", 1570),
]


@pytest.mark.parametrize(("gpu", "optimizer", "precision", "most"), short_form(ON_4_GB, ON_4_GB[:1]))
@compiled_for_gpu
def test_seed_158m_trains_on_a_4_gb_card(gpu: str, optimizer: str, precision: str, most: float) -> None:
    """Its 32 sequences of 256 tokens in one micro-batch, with every back end of the card."""
    found = compiled("seed-158m", gpu, batch_size=32, grad_accum=1, optimizer=optimizer)
    assert (found.precision, found.step_fits) == (precision, True)
    assert found.step.total <= most


@pytest.mark.slow
@compiled_for_gpu
def test_max_4gb_trains_on_a_4_gb_card_with_tensor_cores() -> None:
    """In float32, as on the T1000, it takes 2,999 MiB and does not fit."""
    found = compiled("max-4gb", "rtx3050-4gb")
    shapes = Programs.of(found.config, load_target("rtx3050-4gb")).param_shapes
    assert sum(p.size for p in jax.tree.leaves(shapes)) > 4e8
    assert found.step.total <= 2402
    assert found.step_fits


@compiled_for_gpu
def test_two_cards_divide_the_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the experts and of their state on each card, and all of the rest: what is measured is one card's."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    card = load_target("rtx3060-12gb")
    one, two = (search.mesh_memory(CONFIG.on_mesh(f"expert={n}", 2), card) for n in (1, 2))
    experts = sum(count.total for name, count in count_parameters(CONFIG.model).items() if name == "experts")
    assert (one.arguments - two.arguments) * MIB == pytest.approx(experts / 2 * 3 * 4, rel=0.1)
