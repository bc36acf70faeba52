"""`train.py` fits itself to the device that it has. Here the device is this machine's CPU, with --memory."""

import dataclasses
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import DataConfig, ExecutionConfig, RunConfig, TrainConfig, UserError
from moe_jax.system.environment import MIB
from moe_jax.training import fit as fitting
from moe_jax.training.fit import Device, compiled_here, device_here, fit
from moe_jax.training.plan import Plan, values_of, with_values
from moe_jax.training.run import FirstStepOutOfMemory, take_steps, train
from moe_jax.training.session import Session
from moe_jax.training.start import Start
from tests.support import saved_run, tiny

STEPS = 4


def asked(folder: Path, memory: float = 0, **execution: Any) -> RunConfig:
    """A run whose activations take most of its memory. `memory` in MiB, rounded up."""
    (folder / "text.txt").write_text(
        "<|endoftext|>".join(f"a cat sat on mat {i} and a dog on mat {i}" for i in range(90))
    )
    model = tiny.config(layers=1, width=32, vocab_size=257, seq_len=64)
    return RunConfig(
        out=str(folder / "run"),
        model=model,
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="byte", eval_tokens=64),
        train=TrainConfig(steps=STEPS, batch_size=8, grad_accum=4, log_every=1, eval_every=STEPS, save_every=2),
        execution=ExecutionConfig(
            compute_dtype="float32", memory=f"{memory + 1e-6:.6f}MiB" if memory else "", **execution
        ),
    )


def setting(config: RunConfig) -> tuple[int, int, bool]:
    return config.train.batch_size, config.train.grad_accum, config.execution.remat


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["split"] == "train"]


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "config.json").read_text())


@pytest.fixture(scope="module")
def memories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, bool], Plan]:
    """The real memory of the first four rungs, compiled for this machine."""
    config = asked(tmp_path_factory.mktemp("measured"))
    plans = [
        fitting.plan_step(rung, Device(jax.devices()[0], 1e9, compiled_here))
        for rung in fitting.settings_to_try(config)[:4]
    ]
    return {setting(with_values(config, plan.setting)): plan for plan in plans}


@pytest.mark.runs
def test_no_rung_takes_less_than_its_lower_bound(memories: dict[tuple[int, int, bool], Plan]) -> None:
    """So a rung that is passed over would not have fitted."""
    for plan in memories.values():
        assert 0.05 * plan.total < plan.least <= plan.total


@pytest.fixture(scope="module")
def fitted(
    memories: dict[tuple[int, int, bool], Plan], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Session, tuple[int, int, bool]]:
    """A run with so much memory that neither 32 sequences at once fit, nor 16 without remat."""
    expected = (16, 2, True)
    folder = tmp_path_factory.mktemp("fitted")
    with saved_run.quick_training(folder / "cache", samples=False):
        session = Session.open(asked(folder, memories[expected].total))
        take_steps(session)
    return folder, session, expected


@pytest.mark.runs
def test_a_run_fits_itself_and_its_losses_are_those_of_the_run_that_was_asked_for(
    fitted: tuple[Path, Session, tuple[int, int, bool]],
    memories: dict[tuple[int, int, bool], Plan],
    tmp_path: Path,
) -> None:
    """The oracle measures every rung. Of those that fit, the chosen one has the largest micro-batch, and no remat if
    that fits too."""
    folder, session, expected = fitted
    budget = memories[expected].total
    fits = [rung for rung, plan in memories.items() if plan.total <= budget]
    assert setting(session.config) == expected == max(fits, key=lambda rung: (rung[0], not rung[2]))
    assert session.config.tokens_per_step == asked(tmp_path).tokens_per_step
    with saved_run.quick_training(tmp_path / "cache", samples=False):
        take_steps(Session.open(asked(tmp_path)))
    assert len(losses(folder)) == STEPS
    np.testing.assert_allclose(losses(folder), losses(tmp_path), rtol=1e-5)


@pytest.mark.runs
def test_config_json_has_what_was_chosen_and_beside_it_what_was_asked(
    fitted: tuple[Path, Session, tuple[int, int, bool]], memories: dict[tuple[int, int, bool], Plan]
) -> None:
    folder, session, expected = fitted
    saved = document(folder)
    assert setting(RunConfig.from_dict(saved)) == expected
    budget = round(memories[expected].total, 1)
    assert saved["fitted"] == {
        "device": "cpu",
        "memory": session.config.execution.memory,
        "asked": {"train.batch_size": 8, "train.grad_accum": 4, "execution.remat": False},
        "total_mib": budget,
        "budget_mib": budget,
    }
    above = memories[16, 2, False]
    assert session.notes[0] == (
        f"fitted: 16 x 2 sequences with remat, adamw: {budget:,.0f} of {budget:,.0f} MiB; 16 x 2 sequences, adamw "
        f"needs {above.total:,.0f} MiB"
    )


# At a resume: the saved settings, the flags, the record, the device


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Programs that take as many MiB as the micro-batch has sequences, twice as many without remat, and a quarter with
    a leaner optimizer than AdamW. Returns what was compiled."""
    compiled: list[RunConfig] = []

    def step(config: RunConfig, *_: Any) -> Plan:
        compiled.append(config)
        factor = (1 if config.execution.remat else 2) * (1 if config.train.optimizer == "adamw" else 0.25)
        return Plan(values_of(config), "float32", 0.1, {"step": config.train.batch_size * factor})

    monkeypatch.setattr(fitting, "plan_step", step)
    monkeypatch.setattr(fitting, "plan_between", lambda *_: {"evaluation": 0.1, "decoding": 0.1})
    return compiled


def test_a_resumed_run_keeps_its_settings_on_the_same_device(tmp_path: Path, pretended: list[RunConfig]) -> None:
    first = fit(asked(tmp_path, 16))
    assert setting(first.config) == (16, 2, True)
    del pretended[:]
    again = fit(first.config, saved=first.config, record=first.record)
    assert (again.config, again.record, again.note, pretended) == (first.config, first.record, "", [])
    repeated = fit(asked(tmp_path, 16), saved=first.config, record=first.record)
    assert (repeated.config, pretended) == (first.config, []), "the same command, with --resume"


def test_another_device_or_another_memory_starts_again_from_what_was_asked_for(
    tmp_path: Path, pretended: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remat was not asked for, so a larger device does without. The state still belongs to its optimizer."""
    first = fit(asked(tmp_path, 16, fit="any"))
    typed = dataclasses.replace(first.config, execution=dataclasses.replace(first.config.execution, memory="64MiB"))
    larger = fit(typed, saved=first.config, record=first.record)
    assert setting(larger.config) == (32, 1, False)
    assert larger.config.execution.fit == "any"
    other = SimpleNamespace(device_kind="another", memory_stats=lambda: {"bytes_limit": 32 * MIB / 0.85})
    monkeypatch.setattr(jax, "devices", lambda *_: [other])
    assert setting(fit(first.config, saved=first.config, record=first.record).config) == (16, 2, True)
    free = dataclasses.replace(first.config, execution=dataclasses.replace(first.config.execution, memory=""))
    moved = fit(free, saved=first.config, record=first.record)
    assert setting(moved.config) == (32, 1, True)
    assert (moved.record["device"], moved.record["budget_mib"]) == ("another", 32)
    small = dataclasses.replace(typed, execution=dataclasses.replace(typed.execution, memory="0.5MiB"))
    assert fit(asked(tmp_path, 0.5, fit="any")).config.train.optimizer == "adamw-bf16"
    with pytest.raises(
        UserError, match=r"no setting fits 0 MiB.* the smallest, 1 x 32 .* step; free memory of the device, or"
    ):
        fit(small, saved=first.config, record=first.record)


def test_flags_at_a_resume_are_what_is_asked_for_now(tmp_path: Path, pretended: list[RunConfig]) -> None:
    first = fit(asked(tmp_path, 16))
    train_config = dataclasses.replace(first.config.train, batch_size=3, grad_accum=1)
    changed = fit(dataclasses.replace(first.config, train=train_config), saved=first.config, record=first.record)
    assert setting(changed.config) == (3, 1, True), "remat is as saved: no flag has changed it"
    assert changed.record["asked"] == {"train.batch_size": 3, "train.grad_accum": 1, "execution.remat": True}


def test_off_and_a_mesh_and_a_device_without_a_limit_change_nothing(tmp_path: Path, pretended: list[RunConfig]) -> None:
    for config in (asked(tmp_path, 1, fit="off"), asked(tmp_path), asked(tmp_path, mesh="data=2")):
        assert fit(config).config is config or fit(config).config == config
    assert pretended == []


def test_the_free_memory_is_what_the_device_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """85 % of what JAX may still take: kernels and workspaces of libraries lie outside XLA's plan."""
    stats = {"bytes_limit": 3000 * MIB, "bytes_in_use": 200 * MIB, "pool_bytes": 1}
    device = SimpleNamespace(device_kind="A card", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    found = device_here(asked(tmp_path))
    assert found is not None
    assert (found.device, found.budget) == (device, pytest.approx(2380))
    limited = device_here(asked(tmp_path, 50))
    assert limited is not None
    assert limited.budget == pytest.approx(50)
    stats.clear()
    assert device_here(asked(tmp_path)) is None


# What nothing fits, and a first step that runs out of memory


def test_where_nothing_fits_the_error_says_what_would(tmp_path: Path, pretended: list[RunConfig]) -> None:
    with pytest.raises(UserError) as caught:
        fit(asked(tmp_path, 0.9))
    assert str(caught.value) == (
        "no setting fits 1 MiB: the smallest, 1 x 32 sequences with remat, adamw, needs 1 for its step; use --fit any, "
        "which may take a leaner optimizer, a smaller --seq-len or another --preset"
    )
    with pytest.raises(UserError, match=r"needs 0 for its step; use a smaller --seq-len or another --preset$"):
        fit(asked(tmp_path, 0.2, fit="any"))
    with pytest.raises(UserError, match=r"needs 1 for its step; use a smaller --seq-len or another --preset$"):
        fit(asked(tmp_path, 0.01))  # no optimizer is so lean


def test_after_a_step_without_memory_the_next_rung_is_taken(tmp_path: Path, pretended: list[RunConfig]) -> None:
    """Also where the device does not say what is free. The end of the ladder is an error."""
    first = fit(asked(tmp_path, 32))
    assert setting(first.config) == (32, 1, True)
    assert setting(fit(asked(tmp_path, 32), failed=first.config).config) == (16, 2, False)
    del pretended[:]
    unknown = fit(asked(tmp_path), failed=asked(tmp_path))
    assert (setting(unknown.config), "total_mib" in unknown.record) == ((8, 4, True), False)
    assert unknown.note.endswith("; with 8 x 4 sequences, adamw it ran out of memory")
    last = dataclasses.replace(asked(tmp_path, remat=True), train=TrainConfig(batch_size=1, grad_accum=16))
    with pytest.raises(UserError, match=r"ran out of memory with 1 x 16 sequences with remat, .* no other setting"):
        fit(last, failed=last)


def test_a_first_step_without_memory_takes_the_next_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arrays of the first try are gone before those of the second are made. With --fit off the run ends."""
    tries: list[weakref.ref[Session]] = []
    opened = Session.open

    def without_memory(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def open_session(*arguments: Any) -> Session:
        assert all(earlier() is None for earlier in tries)
        session = opened(*arguments)
        if not tries:
            saved_run.replace_step(session, without_memory)
        tries.append(weakref.ref(session))
        return session

    monkeypatch.setattr(Session, "open", staticmethod(open_session))
    with saved_run.quick_training(tmp_path / "cache", samples=False):
        config = asked(tmp_path)
        assert train(config, Start(config), lambda _: []) == 0
        saved = RunConfig.from_dict(document(tmp_path))
        assert (len(tries), setting(saved), len(losses(tmp_path))) == (2, (8, 4, True), STEPS)
        assert "the first step ran out of memory; trying the next setting" in capsys.readouterr().out
        del tries[:]
        config = dataclasses.replace(asked(tmp_path, fit="off"), out=str(tmp_path / "other"))
        with pytest.raises(FirstStepOutOfMemory, match="RESOURCE_EXHAUSTED"):
            train(config, Start(config), lambda _: [])
