"""The settings that are tried so that a run fits its device, and which one is chosen. No program is compiled."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.config.execution import Fit
from moe_jax.model.costs import adapter_parameters, count_parameters, totals
from moe_jax.system.environment import MIB
from moe_jax.training import fit as fitting
from moe_jax.training.fit import Device
from moe_jax.training.plan import Plan, chosen, values_of, with_values
from tests.support import tiny

CONFIG = RunConfig(model=tiny.config(), train=TrainConfig(batch_size=4, grad_accum=2, optimizer="adamw"))
KINDS = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")

CARD = SimpleNamespace(platform="gpu", device_kind="A card 1", compute_capability="8.6")


def with_adapters(config: RunConfig, rank: int) -> RunConfig:
    """A fine-tuning of this model by adapters."""
    train = dataclasses.replace(config.train, lora_rank=rank, optimizer="adamw", muon_router=False)
    return dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, format="chat"))


# The settings

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
    assert [setting(c) for c in fitting.settings_to_try(asked(4, 2))] == [
        ("adamw", remat, *size) for size in sizes for remat in (False, True)
    ]
    assert [setting(c)[1:] for c in fitting.settings_to_try(asked(1, 12, remat=True))] == [
        (True, size, 12 // size) for size in (12, 6, 3, 1)
    ]


def test_a_leaner_optimizer_comes_last_and_only_if_it_is_asked_for() -> None:
    tried = [setting(c) for c in fitting.settings_to_try(asked(2, fit="any"))]
    assert tried == [(k, r, *size) for k in KINDS for size in ((2, 1), (1, 2)) for r in (False, True)]
    muon = [setting(c)[0] for c in fitting.settings_to_try(asked(1, fit="any", optimizer="muon", remat=True))]
    assert muon == ["muon", *KINDS]
    assert {setting(c)[0] for c in fitting.settings_to_try(asked(1, fit="any", optimizer="adafactor"))} == {"adafactor"}


def test_with_adapters_the_frozen_weights_become_leaner() -> None:
    config = with_adapters(asked(2, fit="any"), 4)
    dtypes = [(c.train.param_dtype, c.train.optimizer) for c in fitting.settings_to_try(config)]
    assert dtypes == [("float32", "adamw")] * 4 + [("bfloat16", "adamw")] * 4
    lean = dataclasses.replace(config, train=dataclasses.replace(config.train, param_dtype="bfloat16"))
    assert len(fitting.settings_to_try(lean)) == 4


def test_a_setting_in_a_few_words() -> None:
    assert plan(asked(8)).name == "8 sequences, adamw"
    assert plan(asked(4, 2, remat=True)).name == "4 x 2 sequences with remat, adamw"
    lean = with_adapters(asked(8, param_dtype="bfloat16"), 4)
    assert plan(lean).name == "8 sequences, adamw, bfloat16 weights"


# The plans


def oracle(config: RunConfig, memory: dict[Setting, float], budget: float) -> Setting | None:
    """Of all settings with the same sequences a step that fit, the one with the fewest operations: the optimizer that
    was asked for, then the largest micro-batch, then no remat. Independent of the order in which the ladder tries."""
    sequences = config.train.batch_size * config.train.grad_accum
    fitting = [s for s, mib in memory.items() if mib <= budget and s[2] * s[3] == sequences]
    return min(fitting, key=lambda s: (KINDS.index(s[0]), -s[2], s[1]), default=None)


def plan(config: RunConfig, *programs: float, least: float = 1.0) -> Plan:
    """With MiB of the step, and of evaluation and decoding if they are given."""
    names = ("step", "evaluation", "decoding")
    return Plan(values_of(config), "bfloat16", least, dict(zip(names, programs, strict=False)), "cuDNN's")


@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["auto", "any"]), st.booleans())
def test_the_fastest_setting_that_fits_is_chosen(data: Any, batch: int, accum: int, fit: Fit, remat: bool) -> None:
    """Whatever memory the steps take. Tokens a step are as asked."""
    config = asked(batch, accum, fit, remat)
    mib = {setting(c): data.draw(st.integers(1, 9)) for c in fitting.settings_to_try(config)}
    compiled: list[Setting] = []

    def step(rung: RunConfig, device: Device, which: str) -> Plan:
        compiled.append(setting(rung))
        return plan(rung, mib[setting(rung)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "plan_step", step)
        patch.setattr(fitting, "plan_between", lambda *_: {"evaluation": 1.0, "decoding": 1.0})
        plans = list(fitting.plans_until_one_fits(config, Device(None, 4, max)))
    best = oracle(config, mib, 4)
    tried = [with_values(config, p.setting) for p in plans]
    assert [setting(c) for c, p in zip(tried, plans, strict=True) if p.fits(4)] == ([best] if best else [])
    assert len(set(compiled)) == len(compiled) == len(plans)
    assert all(c.tokens_per_step == config.tokens_per_step for c in tried)
    assert chosen(plans, 4).total == (mib[best] if best else min(mib.values()))


def test_what_runs_between_the_steps_must_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on the optimizer only. So where it does not fit, its next rungs are left out."""
    between = {"adamw": 101.0, "adamw-bf16": 100.0}
    monkeypatch.setattr(fitting, "plan_step", lambda config, *_: plan(config, 90))
    monkeypatch.setattr(fitting, "plan_between", lambda c, _: {"evaluation": between[c.train.optimizer], "decoding": 5})
    plans = list(fitting.plans_until_one_fits(asked(8, fit="any"), Device(None, 100, max)))
    assert [p.name for p in plans] == ["8 sequences, adamw", "8 sequences, adamw-bf16"]
    assert [(p.total, p.fits(100)) for p in plans] == [(101, False), (100, True)]


def test_below_a_setting_that_failed() -> None:
    """Also where the setting is not a rung: 4 x 3 sequences lie between 6 x 2 and 3 x 4."""
    tried = [setting(c) for c in fitting.settings_after(asked(4, 3), asked(4, 3, remat=True))]
    assert tried == [("adamw", remat, *size) for size in ((3, 4), (1, 12)) for remat in (False, True)]
    assert fitting.settings_after(asked(4, 3), asked(1, 12, remat=True)) == []
    assert setting(fitting.settings_after(asked(8, fit="any"), asked(1, 8, remat=True))[0]) == (
        "adamw-bf16",
        False,
        8,
        1,
    )


def device(budget: float, asked: list[Any] | None = None, mib: float = 100.0) -> Device:
    """On an invented card, where every program takes `mib`. The arguments of each are added to `asked`."""

    def measure(_: Any, *arguments: Any) -> float:
        if asked is not None:
            asked.append(arguments)
        return mib

    return Device(CARD, budget, measure)


def test_a_step_is_planned_with_its_batch_unless_it_cannot_fit() -> None:
    """Parameters, gradients and moments alone take more than 0.01 MiB."""
    compiled: list[Any] = []
    found = fitting.plan_step(CONFIG, device(1000, compiled))
    assert (found.precision, found.programs) == ("bfloat16", {"step": 100})
    ((_, tokens),) = compiled
    assert (tokens.shape, tokens.dtype) == ((2, 4, 9), jnp.int32)
    small = fitting.plan_step(CONFIG, device(0.01, compiled))
    assert (small.programs, small.total, small.fits(0.01)) == ({}, small.least, False)
    assert small.least > 0.01
    assert len(compiled) == 1


def test_between_the_steps_the_optimizers_state_stays() -> None:
    compiled: list[Any] = []
    found = fitting.plan_between(CONFIG, device(1000, compiled))
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
    config = with_adapters(CONFIG, 4)
    fitting.plan_step(config, device(1000, compiled))
    adapters, whole = adapter_parameters(config).total, totals(count_parameters(config.model)).total
    ((state, batch),) = compiled
    assert sum(x.size for x in jax.tree.leaves(state.adapters)) == adapters
    assert (batch.tokens.shape, batch.weights.shape) == ((2, 4, 9), (2, 4, 8))
    waiting = (4 * whole + 4 * adapters + 8 * adapters) / MIB
    for total in fitting.plan_between(config, device(1000)).values():
        assert total - 100 == pytest.approx(waiting, rel=0.01)
