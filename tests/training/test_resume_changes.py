"""A resumed run may be computed in another way, and must stay the same model on the same text."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest

from moe_jax.config import (
    ConfigError,
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    RoutingConfig,
    RunConfig,
    TrainConfig,
    load_config,
)
from moe_jax.config.presets import preset
from moe_jax.config.section import typed
from moe_jax.model import precision
from moe_jax.training.loop import finish, train
from moe_jax.training.session import Session
from moe_jax.training.start import resumed_run
from tests.support import tiny
from tests.support.saved_run import resuming

SAVED = dataclasses.replace(preset("nano"), out="runs/held")
SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "routing": RoutingConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "execution": ExecutionConfig,
}
FIELDS = [
    (section, f.name) for section, owner in SECTIONS.items() for f in dataclasses.fields(owner) if f.name != "routing"
]
OTHER = {"heads": 2, "tokenizer": "byte", "source": "tinystories", "warmup_steps": 3, "dropout": 0.5, "eval_tokens": 99}
OTHER |= {"mesh": "data=2", "attention_dropout": 0.5, "beta1": 0.5, "beta2": 0.5, "head_size": 64}
"""Of the fields that take no neighbouring value."""
UNTIED = {"tie_value_output_init": False}
ALSO: dict[tuple[str, str], dict[str, Any]] = {("model", "kv_heads"): UNTIED, ("model", "head_size"): UNTIED}
ALSO |= {("train", name): {"lora_rank": 4} for name in ("lora_alpha", "train_router")}
"""What must change with a field, since the new value forbids what `SAVED` has there. The field itself comes first in
the order of the settings, so it is the one that is named."""


def other(section: str, name: str) -> Any:
    """A value that the field may have too."""
    value = getattr(SAVED.section(section), name)
    if name in OTHER:
        return OTHER[name]
    kind = next(f.type for f in dataclasses.fields(SECTIONS[section]) if f.name == name)
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    return not value if isinstance(value, bool) else value * 2 or 1


def changed(section: str, name: str, value: Any) -> RunConfig:
    """The saved settings with one field changed."""
    if section == "routing":
        return dataclasses.replace(SAVED, model=SAVED.model.with_routing(**{name: value}))
    also = ALSO.get((section, name), {})
    return dataclasses.replace(SAVED, **{section: dataclasses.replace(SAVED.section(section), **also, **{name: value})})


MAY_CHANGE = {("data", "source"), ("data", "eval_tokens")}
"""The text itself is compared by its digest."""
MAY_CHANGE |= {("execution", f.name) for f in dataclasses.fields(ExecutionConfig)}
MAY_CHANGE |= {("routing", "device_capacity_factor")}
MAY_CHANGE |= {("train", f.name) for f in dataclasses.fields(TrainConfig)} - {
    ("train", name) for name in ("optimizer", "param_dtype", "lora_rank", "lora_alpha", "train_router")
}


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=lambda x: x)
def test_which_settings_may_change_at_a_resume(section: str, name: str) -> None:
    """Execution, what matters on a mesh only, and the course of training may. Model, routing, data, optimizer and
    stored dtype may not; the error is one line with the flag, both values, and what to do."""
    value = other(section, name)
    config = changed(section, name, value)
    assert config != SAVED
    if (section, name) in MAY_CHANGE:
        resumed_run(SAVED).check(config)
        return
    with pytest.raises(ConfigError) as caught:
        resumed_run(SAVED).check(config)
    there = getattr(SAVED.section(section), name)
    assert str(caught.value) == (
        f"{typed(section, name, value)}: the run in runs/held has {there}; "
        "leave the flag out to resume it, or start a new run with another --out"
    )


def test_preset_and_origin_stay() -> None:
    changes = {"--preset story": {"preset": "story"}}
    changes |= {"--upcycle runs/other": {"upcycle": "runs/other"}, "--set base=runs/other": {"base": "runs/other"}}
    for flag, change in changes.items():
        with pytest.raises(ConfigError, match=flag):
            resumed_run(SAVED).check(dataclasses.replace(SAVED, **change))


# Whole runs


def run(folder: Path, steps: int, **execution: Any) -> Session:
    """Train to a step, from the newest checkpoint where there is one."""
    (folder / "text.txt").write_text("<|endoftext|>".join(f"a cat sat on mat {i}" for i in range(60)))
    config = RunConfig(
        out=str(folder / "run"),
        model=tiny.config(layers=1, width=16, vocab_size=257),
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="byte", eval_tokens=64),
        train=TrainConfig(steps=steps, batch_size=2, warmup_steps=0, log_every=1, eval_every=2, save_every=2),
        execution=ExecutionConfig(**({"compute_dtype": "float32"} | execution)),
    )
    saved = load_config(folder / "run")
    if saved is not None:
        resumed_run(saved).check(config)
    session = Session.open(config, resuming(saved))
    train(session)
    return session


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("execution", "rounding"), [({"remat": True}, 1e-5), ({"compute_dtype": "bfloat16"}, 2**-6)], ids=["remat", "dtype"]
)
def test_a_run_goes_on_in_another_execution(execution: dict[str, Any], rounding: float, tmp_path: Path) -> None:
    """Four steps, then two more, beside two more in the first execution: the same losses to the rounding of the
    arithmetic, and the change stands in config.json."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, 4)
    there, here = run(tmp_path / "one", 6), run(tmp_path / "other", 6, **execution)
    assert here.progress.resumed_from == 4
    ((field, value),) = execution.items()
    assert getattr(here.config.execution, field) == value
    assert f"execution.{field} {getattr(there.config.execution, field)} -> {value}" in here.notes[0]
    lines = [(tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines() for name in ("one", "other")]
    losses = [[r["loss"] for r in map(json.loads, found) if r["step"] > 4] for found in lines]
    assert len(losses[0]) == 3  # two steps and the last evaluation
    np.testing.assert_allclose(losses[1], losses[0], rtol=rounding)
    (entry,) = json.loads((tmp_path / "other" / "run" / "config.json").read_text())["history"]
    assert entry["changed"][f"execution.{field}"] == [getattr(there.config.execution, field), value]
    assert finish(here)["precision"] == here.config.execution.compute_dtype


@pytest.mark.reliability
def test_a_run_on_another_machine_keeps_the_precision_that_auto_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second machine has units for bfloat16. A new run there takes them, and so does the old one if it is asked."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "")
    assert run(tmp_path / "old", 2, compute_dtype="auto").programs.policy.compute == "float32"
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "AMX")
    kept = run(tmp_path / "old", 4, compute_dtype="auto").programs.policy
    assert (kept.compute, kept.reason) == ("float32", "kept from the start of the run; --precision changes it")
    assert run(tmp_path / "new", 2, compute_dtype="auto").programs.policy.compute == "bfloat16"
    assert run(tmp_path / "old", 6, compute_dtype="bfloat16").programs.policy.compute == "bfloat16"
