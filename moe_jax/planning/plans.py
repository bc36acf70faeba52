"""A plan: one setting, and the memory of its programs. The plans of the presets on the described cards are recorded in
`plans.json`, so that they are there at once. `benchmarks/record_plans.py` writes it.

Nothing is imported that imports jax.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import SECTIONS, RunConfig
from moe_jax.planning.target import Target
from moe_jax.system.files import json_text

RECORDED = Path(__file__).with_name("plans.json")
_TRAIN = ("batch_size", "grad_accum", "optimizer", "param_dtype")
"""With remat, the settings in which the plans of a run differ."""


class Plan(NamedTuple):
    """One rung, and the memory of its programs."""

    config: RunConfig
    precision: str
    least: float
    """MiB that a training step needs whatever the compiler does."""
    programs: dict[str, float]
    """MiB of the compiled programs, with what is in memory beside them. The step comes first. The others are there only
    if it fits; nothing is there if `least` does not fit."""
    attention: str = ""
    """The form of attention in training, and the reason for it."""

    @property
    def total(self) -> float:
        """MiB of the largest program. At least that if the step was not compiled."""
        return max(self.programs.values(), default=self.least)

    def fits(self, budget: float) -> bool:
        return len(self.programs) > 1 and self.total <= budget

    def summary(self, gpu: str, budget: float) -> dict[str, Any]:
        """For JSON output."""
        train = self.config.train
        kept = ("grad_accum", "optimizer", "lora_rank", "param_dtype")
        return {
            "preset": self.config.preset,
            "gpu": gpu,
            "precision": self.precision,
            "compute_dtype": self.precision,
            "total_mib": round(self.total, 1),
            "budget_mib": round(budget, 1),
            "fits": self.fits(budget),
            "micro_batch": train.batch_size,
            "remat": self.config.execution.remat,
            **{name: getattr(train, name) for name in kept},
        }

    def to_json(self) -> dict[str, Any]:
        """The plan without the settings that all plans of a run share."""
        setting = {name: getattr(self.config.train, name) for name in _TRAIN} | {"remat": self.config.execution.remat}
        programs = {name: round(mib, 1) for name, mib in self.programs.items()}
        own = {"precision": self.precision, "least": round(self.least, 1), "attention": self.attention}
        return {"setting": setting, **own, "programs": programs}

    @classmethod
    def from_json(cls, values: dict[str, Any], config: RunConfig) -> "Plan":
        """A plan of the run `config`."""
        train = {name: values["setting"][name] for name in _TRAIN}
        execution = dataclasses.replace(config.execution, remat=values["setting"]["remat"])
        setting = dataclasses.replace(config, train=dataclasses.replace(config.train, **train), execution=execution)
        return cls(setting, *(values[name] for name in ("precision", "least", "programs", "attention")))


def named(config: RunConfig) -> str:
    """A setting in a few words."""
    train = config.train
    batch = f"{train.batch_size} x {train.grad_accum}" if train.grad_accum > 1 else f"{train.batch_size}"
    kind = train.optimizer if train.param_dtype == "float32" else f"{train.optimizer}, {train.param_dtype} weights"
    return f"{batch} sequences{' with remat' * config.execution.remat}, {kind}"


def chosen(plans: Sequence[Plan], budget: float) -> Plan:
    """The plan to use, of those that `ladder.walk` gives: the one that fits, or else the smallest."""
    return next((plan for plan in plans if plan.fits(budget)), min(plans, key=lambda plan: plan.total))


# What is recorded


def digest(config: RunConfig, target: Target) -> str:
    """What a plan depends on: every setting of the run, and the description of the card."""
    values = [value for value in config.settings() if value[0] in SECTIONS]
    return hashlib.sha256(json_text([values, target.text]).encode()).hexdigest()[:16]


@functools.cache
def _recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def recorded(config: RunConfig, target: Target) -> tuple[list[Plan], str]:
    """The plans that `ladder.walk` gave for these settings on this card, and the version of jaxlib that compiled them.
    Empty if they are not recorded."""
    found = _recorded().get(f"{config.preset} {target.name}", {})
    if found.get("digest") != digest(config, target):
        return [], ""
    return [Plan.from_json(plan, config) for plan in found["plans"]], found["jaxlib"]
