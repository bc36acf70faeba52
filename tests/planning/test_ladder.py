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
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.cli.main import main, run_command
from moe_jax.cli.train import Train
from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.config.train import Fit
from moe_jax.model.costs import adapter_parameters, count_parameters, totals
from moe_jax.planning import ladder
from moe_jax.planning.ladder import Room
from moe_jax.planning.plans import Plan, chosen
from moe_jax.planning.target import load_target
from moe_jax.system import environment
from moe_jax.system.environment import MIB
from tests.planning.invented import memory, target
from tests.support import short_form, tiny
from tests.support.programs import compiled_for_gpu

CONFIG = RunConfig(model=tiny.config(), train=TrainConfig(batch_size=4, grad_accum=2, optimizer="adamw"))
KINDS = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")

# Rungs

type Setting = tuple[str, bool, int, int]
"""Optimizer, remat, sequences of a micro-batch, micro-batches."""


def setting(config: RunConfig) -> Setting:
    return config.train.optimizer, config.execution.remat, config.train.batch_size, config.train.grad_accum


def asked(batch: int = 8, accum: int = 1, fit: Fit = "auto", remat: bool = False, **train: Any) -> RunConfig:
    values = {"batch_size": batch, "grad_accum": accum} | train
    execution = ExecutionConfig(remat=remat, fit=fit)
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **values), execution=execution)


def test_the_larger_micro_batch_comes_first_and_of_the_same_the_one_without_remat() -> None:
    sizes = [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert [setting(c) for c in ladder.rungs(asked(4, 2))] == [
        ("adamw", remat, *size) for size in sizes for remat in (False, True)
    ]
    assert [setting(c)[1:] for c in ladder.rungs(asked(1, 12, remat=True))] == [
        (True, size, 12 // size) for size in (12, 6, 3, 1)
    ]


def test_a_leaner_optimizer_comes_last_and_only_if_it_is_asked_for() -> None:
    tried = [setting(c) for c in ladder.rungs(asked(2, fit="any"))]
    assert tried == [(k, r, *size) for k in KINDS for size in ((2, 1), (1, 2)) for r in (False, True)]
    muon = [setting(c)[0] for c in ladder.rungs(asked(1, fit="any", optimizer="muon", remat=True))]
    assert muon == ["muon", *KINDS]
    assert {setting(c)[0] for c in ladder.rungs(asked(1, fit="any", optimizer="adafactor"))} == {"adafactor"}


def test_with_adapters_the_frozen_weights_become_leaner() -> None:
    config = ladder.with_adapters(asked(2, fit="any"), 4)
    dtypes = [(c.train.param_dtype, c.train.optimizer) for c in ladder.rungs(config)]
    assert dtypes == [("float32", "adamw")] * 4 + [("bfloat16", "adamw")] * 4
    lean = dataclasses.replace(config, train=dataclasses.replace(config.train, param_dtype="bfloat16"))
    assert len(ladder.rungs(lean)) == 4


def test_a_setting_in_a_few_words() -> None:
    assert ladder.named(asked(8)) == "8 sequences, adamw"
    assert ladder.named(asked(4, 2, remat=True)) == "4 x 2 sequences with remat, adamw"
    lean = ladder.with_adapters(asked(8, param_dtype="bfloat16"), 4)
    assert ladder.named(lean) == "8 sequences, adamw, bfloat16 weights"


# The walk


def oracle(config: RunConfig, memory: dict[Setting, float], budget: float) -> Setting | None:
    """Of all settings with the same sequences a step that fit, the one with the fewest operations: the optimizer that
    was asked for, then the largest micro-batch, then no remat. Independent of the order in which the ladder tries."""
    sequences = config.train.batch_size * config.train.grad_accum
    fitting = [s for s, mib in memory.items() if mib <= budget and s[2] * s[3] == sequences]
    return min(fitting, key=lambda s: (KINDS.index(s[0]), -s[2], s[1]), default=None)


def plan(config: RunConfig, *programs: float, least: float = 1.0) -> Plan:
    """With MiB of the step, and of evaluation and decoding if they are given."""
    names = ("step", "evaluation", "decoding")
    return Plan(config, "bfloat16", least, dict(zip(names, programs, strict=False)), "cuDNN's")


@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["auto", "any"]), st.booleans())
def test_the_fastest_setting_that_fits_is_chosen(data: Any, batch: int, accum: int, fit: Fit, remat: bool) -> None:
    """Whatever memory the steps take. Tokens a step are as asked."""
    config = asked(batch, accum, fit, remat)
    mib = {setting(c): data.draw(st.integers(1, 9)) for c in ladder.rungs(config)}
    compiled: list[Setting] = []

    def step(rung: RunConfig, room: Room, which: str) -> Plan:
        compiled.append(setting(rung))
        return plan(rung, mib[setting(rung)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "plan_step", step)
        patch.setattr(ladder, "plan_between", lambda *_: {"evaluation": 1.0, "decoding": 1.0})
        plans = list(ladder.walk(config, Room(None, 4, max)))
    best = oracle(config, mib, 4)
    assert [setting(p.config) for p in plans if p.fits(4)] == ([best] if best else [])
    assert len(set(compiled)) == len(compiled) == len(plans)
    assert all(p.config.tokens_per_step == config.tokens_per_step for p in plans)
    assert chosen(plans, 4).total == (mib[best] if best else min(mib.values()))


def test_what_runs_between_the_steps_must_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on the optimizer only. So where it does not fit, its next rungs are left out."""
    between = {"adamw": 101.0, "adamw-bf16": 100.0}
    monkeypatch.setattr(ladder, "plan_step", lambda config, *_: plan(config, 90))
    monkeypatch.setattr(ladder, "plan_between", lambda c, _: {"evaluation": between[c.train.optimizer], "decoding": 5})
    plans = list(ladder.walk(asked(8, fit="any"), Room(None, 100, max)))
    assert [setting(p.config) for p in plans] == [("adamw", False, 8, 1), ("adamw-bf16", False, 8, 1)]
    assert [(p.total, p.fits(100)) for p in plans] == [(101, False), (100, True)]


def test_below_a_setting_that_failed() -> None:
    """Also where the setting is not a rung: 4 x 3 sequences lie between 6 x 2 and 3 x 4."""
    tried = [setting(c) for c in ladder.below(asked(4, 3), asked(4, 3, remat=True))]
    assert tried == [("adamw", remat, *size) for size in ((3, 4), (1, 12)) for remat in (False, True)]
    assert ladder.below(asked(4, 3), asked(1, 12, remat=True)) == []
    assert setting(ladder.below(asked(8, fit="any"), asked(1, 8, remat=True))[0]) == ("adamw-bf16", False, 8, 1)


def room(budget: float, asked: list[Any] | None = None, mib: float = 100.0) -> Room:
    """On an invented card, where every program takes `mib`. The arguments of each are added to `asked`."""

    def measure(_: Any, *arguments: Any) -> float:
        if asked is not None:
            asked.append(arguments)
        return mib

    return Room(target(), budget, measure)


def test_a_step_is_planned_with_its_batch_unless_it_cannot_fit() -> None:
    """Parameters, gradients and moments alone take more than 0.01 MiB."""
    compiled: list[Any] = []
    found = ladder.plan_step(CONFIG, room(1000, compiled))
    assert (found.precision, found.programs) == ("bfloat16", {"step": 100})
    ((_, tokens),) = compiled
    assert (tokens.shape, tokens.dtype) == ((2, 4, 9), jnp.int32)
    small = ladder.plan_step(CONFIG, room(0.01, compiled))
    assert (small.programs, small.total, small.fits(0.01)) == ({}, small.least, False)
    assert small.least > 0.01
    assert len(compiled) == 1


def test_between_the_steps_the_optimizers_state_stays() -> None:
    compiled: list[Any] = []
    found = ladder.plan_between(CONFIG, room(1000, compiled))
    assert list(found) == ["evaluation", "decoding"]
    state = sum(x.size * 4 for x in jax.tree.leaves(tiny.build(CONFIG.model)[1])) * 2 / MIB
    for total in found.values():
        assert total - 100 == pytest.approx(state, rel=0.02)
    evaluation, decoding = compiled
    assert evaluation[1].shape[1] == CONFIG.model.seq_len
    assert (decoding[1].position.shape, len(decoding)) == ((1,), 5), "the loop of several tokens"


def test_adapters_are_planned_with_their_state_and_a_masked_batch() -> None:
    """The optimizer has two numbers for each adapter. Between the steps the merged weights are beside the others."""
    compiled: list[Any] = []
    config = ladder.with_adapters(CONFIG, 4)
    ladder.plan_step(config, room(1000, compiled))
    adapters, whole = adapter_parameters(config).total, totals(count_parameters(config.model)).total
    ((state, batch),) = compiled
    assert sum(x.size for x in jax.tree.leaves(state.adapters)) == adapters
    assert (batch.tokens.shape, batch.weights.shape) == ((2, 4, 9), (2, 4, 8))
    waiting = (4 * whole + 4 * adapters + 8 * adapters) / MIB
    for total in ladder.plan_between(config, room(1000)).values():
        assert total - 100 == pytest.approx(waiting, rel=0.01)


def test_the_largest_smaller_preset_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = {"nano": 10, "story": 20, "story-cpu": 20, "story-4gb": 60}
    monkeypatch.setattr(ladder, "plan_step", lambda c, *_: plan(c, takes[c.preset]))
    monkeypatch.setattr(ladder, "plan_between", lambda *_: {"evaluation": 1.0, "decoding": 1.0})
    seed = with_vocabulary(preset("seed-158m"))
    assert ladder.fitting_preset(seed, room(60)) == "story-4gb"
    assert ladder.fitting_preset(seed, room(15)) == "nano"
    assert ladder.fitting_preset(seed, room(5)) == ""
    assert ladder.fitting_preset(with_vocabulary(preset("nano")), room(60)) in ("", "story-cpu")


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
    monkeypatch.setattr(ladder, "gpu_devices", lambda _, topology: described.append(topology) or ["cards"])
    monkeypatch.setattr(ladder, "mesh_of", lambda text, devices: (text, devices))
    monkeypatch.setattr(ladder.Programs, "of", lambda *_, mesh: taken.append(mesh) or programs)
    monkeypatch.setattr(ladder, "lower_for", lambda _, program, *given: ("for one", *given))
    monkeypatch.setattr(ladder, "measured", lambda *given: taken.append(given[1:]) or memory(7))
    config = CONFIG.on_mesh(mesh, 2)
    assert ladder.mesh_memory(config, target()) == memory(7)
    assert described == [topology]
    batch = max(config.train.batch_size, config.train.grad_accum)
    count = config.train.batch_size // 2
    lowered = ("for one" if one else "for the mesh", "state", batch)
    assert taken == [(mesh, ["cards"]), (lowered, {}, f"{count} cards, {mesh}")]


# The command


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """A compiler that says 100 MiB for every program between steps, and for a step 600 MiB a byte of state, 2,000 MiB
    for all sequences without remat, and 500 with it. Accumulation takes 3,000. Returns what was compiled."""
    steps: list[RunConfig] = []

    def step(config: RunConfig, *_: Any) -> Plan:
        steps.append(config)
        train = config.train
        state = {"adamw": 4, "adamw-bf16": 3, "adamw-8bit": 1, "adafactor": 0}[train.optimizer]
        activations = 3000 if train.grad_accum > 1 else 500 if config.execution.remat else 2000
        return plan(config, 600 * state + activations)

    monkeypatch.setattr(ladder, "plan_step", step)
    monkeypatch.setattr(ladder, "plan_between", lambda *_: {"evaluation": 100.0, "decoding": 50.0})
    monkeypatch.setattr(environment, "prepare_environment", list)
    return steps


def test_the_command_is_what_was_typed_because_the_run_chooses_the_same(
    pretended: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Four bytes of state are too many for 2,402 MiB. With three, 1,800 + 500 with remat fit."""
    given = ["--gpu", "quadro-t1000-4gb", "--optimizer", "adamw-bf16", "--seq-len", "128", "--set", "model.bias=false"]
    assert main(run_command, ["plan", *given]) == 0
    assert [setting(c) for c in pretended] == [("adamw-bf16", False, 32, 1), ("adamw-bf16", True, 32, 1)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == (
        "uv run --extra cuda12 train.py --preset=seed-158m --optimizer=adamw-bf16 --seq-len=128 --set=model.bias=false"
    )
    result = json.loads(lines[-1])
    assert result["command"] == lines[-2]
    assert (result["total_mib"], result["fits"], result["micro_batch"]) == (2300.0, True, 32)
    assert (result["optimizer"], result["remat"], result["gpu"]) == ("adamw-bf16", True, "quadro-t1000-4gb")
    trained = Train.parse(lines[-2].split()[5:]).settings.config
    assert with_vocabulary(trained).model == pretended[0].model
    assert trained.train == dataclasses.replace(preset("seed-158m").train, optimizer="adamw-bf16")


@pytest.mark.parametrize("words", [["--fit", "any"], ["--memory", "3GiB"]])
def test_a_leaner_optimizer_or_another_memory_is_asked_for(
    words: list[str], pretended: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_command, ["plan", "--optimizer", "adamw", *words]) == 0
    *_, command, last = capsys.readouterr().out.splitlines()
    assert command.endswith("".join(f" {flag}={value}" for flag, value in [words]))
    result = json.loads(last)
    assert result["optimizer"] == ("adamw-bf16" if words[0] == "--fit" else "adamw")
    assert result["budget_mib"] == (2402.3 if words[0] == "--fit" else 3072)


def test_adapters_are_planned_beside_frozen_weights_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, pretended: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Here 500 MiB a byte of a weight, so bfloat16 without remat."""

    def step(config: RunConfig, *_: Any) -> Plan:
        return plan(config, 500 * (2 if config.train.param_dtype == "bfloat16" else 4) + 1000)

    monkeypatch.setattr(ladder, "plan_step", step)
    assert main(run_command, ["plan", "--preset", "seed-158m", "--lora", "16", "--fit", "any"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(
        "uv run --extra cuda12 python -m moe_jax sft --run RUN --data CHATS.jsonl --out NEW --fit=any --lora=16"
    )
    assert json.loads(lines[-1])["param_dtype"] == "bfloat16"


def test_the_command_fails_where_nothing_fits(pretended: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_command, ["plan", "--optimizer", "adamw", "--memory", "100MB", "--fit", "any"]) == 1
    assert len(pretended) == 4 * 2 * 6, "four optimizers with and without remat, of 32, 16, 8, 4, 2 and 1 sequences"
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["fits"], result["command"], result["total_mib"]) == (False, None, 500)


def test_a_mesh_is_planned_with_the_sequences_of_each_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[RunConfig] = []
    monkeypatch.setattr(environment, "prepare_environment", list)
    monkeypatch.setattr(ladder, "mesh_memory", lambda config, target: planned.append(config) or memory(1000))
    assert main(run_command, ["plan", "--mesh", "expert=4", "--gpu", "rtx3060-12gb", "--optimizer", "adafactor"]) == 0
    (config,) = planned
    assert (config.execution.mesh, config.train.batch_size, config.train.grad_accum) == ("expert=4", 128, 1)
    *_, command, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["total_mib"], result["fits"], result["micro_batch"]) == (1000.0, True, 128)
    assert command == result["command"]
    assert " --optimizer=adafactor --mesh=expert=4 --batch-size=128 --grad-accum=1" in command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "rtx9090"], "--gpu rtx9090: must be one of h100-80gb, quadro-t1000-4gb, rtx2060-6gb"),
        (["--data", "stories"], "--data: no such flag"),
        (["--mesh", "data=9"], "--mesh data=9: has 9 places; give at most 8, or a multiple"),
        (["--mesh", "data=2", "--lora", "4"], "--lora 4: is for a plan of one GPU"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, pretended: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_command, ["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert pretended == []


# Compiled for described cards

FITTING = [
    ("seed-158m", "rtx3050-4gb", "bfloat16", True),
    ("seed-158m", "quadro-t1000-4gb", "float32", True),
    ("seed-158m", "rtx2060-6gb", "float16", False),
    ("seed-158m", "rtx3060-12gb", "bfloat16", False),
    ("seed-158m", "h100-80gb", "bfloat16", False),
    ("story-4gb", "rtx3050-4gb", "bfloat16", True),
    ("max-4gb", "rtx3050-4gb", "bfloat16", True),
    ("max-4gb", "rtx3060-12gb", "bfloat16", False),
]
"""Preset, card, and the precision and the remat that are chosen."""


@pytest.mark.parametrize(("name", "gpu", "precision", "remat"), short_form(FITTING, FITTING[:1]))
@compiled_for_gpu
def test_a_preset_as_it_is_shipped_fits_the_card(name: str, gpu: str, precision: str, remat: bool) -> None:
    """What `train.py --preset NAME` chooses there, without another flag: all sequences of a step at once, and the
    optimizer of the preset. At most four programs are compiled on the way."""
    config, target = with_vocabulary(preset(name)), load_target(gpu)
    plans = list(ladder.walk(config, Room.on(target)))
    best = plans[-1]
    assert best.fits(target.budget)
    sequences = config.train.batch_size * config.train.grad_accum
    assert (best.precision, *setting(best.config)) == (precision, config.train.optimizer, remat, sequences, 1)
    assert sum(len(plan.programs) for plan in plans) <= 4


@compiled_for_gpu
def test_two_cards_divide_the_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the experts and of their state on each card, and all of the rest: what is measured is one card's."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    card = load_target("rtx3060-12gb")
    one, two = (ladder.mesh_memory(CONFIG.on_mesh(f"expert={n}", 2), card) for n in (1, 2))
    experts = sum(count.total for name, count in count_parameters(CONFIG.model).items() if name == "experts")
    assert (one.arguments - two.arguments) * MIB == pytest.approx(experts / 2 * 3 * 4, rel=0.1)
