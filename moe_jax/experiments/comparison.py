"""A fair comparison of a mixture of experts with its dense baselines, over seeds.

One baseline has the same active parameters, the other the same total. The rest of the recipe is the same. Each
baseline is trained twice: for as many tokens as the mixture, and for as much time as the mixture. So the step times of
the models are measured in turn before the training. The numbers of steps follow from them. Before that,
`tuning.py` can choose the learning rate and the depth of each model.

    OUT/plan.json                          the request, the measured step times, the steps of each arm, the search
    OUT/dense-active-500-steps-seed-0/     ordinary runs of `train.py`
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_jax.config import Dense, RunConfig
from moe_jax.config.baselines import DENSE_BASELINES, dense_baseline
from moe_jax.experiments.study_runs import run_config
from moe_jax.experiments.tuning import Tuning
from moe_jax.model.costs import training_flops
from moe_jax.system import machine
from moe_jax.system.files import write_atomically
from moe_jax.system.json_text import json_text
from moe_jax.system.timing import alternate
from moe_jax.training.random_tokens import RandomTokenTrainer

Basis = Literal["tokens", "wall"]
ROUNDS = 9
"""Steps of each model that are timed."""


class Arm(NamedTuple):
    """One kind of run, trained once for each seed."""

    dense: Dense
    basis: Basis
    """The budget that is the same as the mixture's: tokens, or wall-clock time."""
    steps: int

    @property
    def name(self) -> str:
        name = DENSE_BASELINES[self.dense]
        return name if self.dense == "none" else f"{name}, same {self.basis}"


@dataclass(frozen=True)
class Plan:
    """The models to train, and the number of steps of each."""

    base: RunConfig
    """The configuration of the mixture, with its vocabulary size. Each run replaces seed, steps and folder."""
    flops: float
    step_seconds: dict[Dense, float]
    """Median time of one step of each model to train, the mixture first. The models are measured in turn."""
    tuning: Tuning | None = None
    """The search for each model's learning rate and depth. None: all have those of `base`."""

    @classmethod
    def make(cls, base: RunConfig, flops: float, tuning: Tuning | None, models: Sequence[Dense]) -> "Plan":
        """Measure the step times of the models: the mixture, "none", and its baselines."""
        unmeasured = cls(base, flops, {}, tuning)
        train = base.train
        trainers = {
            DENSE_BASELINES[dense]: RandomTokenTrainer.of(
                unmeasured.settings(dense), train.batch_size, train.grad_accum
            )
            for dense in models
        }
        times = alternate(dict(trainers), ROUNDS)
        seconds = {dense: times[DENSE_BASELINES[dense]].median for dense in models}
        return dataclasses.replace(unmeasured, step_seconds=seconds)

    def settings(self, dense: Dense) -> RunConfig:
        """The settings of a model, as they were chosen for it."""
        side = dense_baseline(self.base, dense)
        return side if self.tuning is None else self.tuning.chosen(dense).apply(side)

    def arms(self) -> list[Arm]:
        """The arms, the mixture first. Its steps are the budget divided by the operations of one step, rounded down."""
        steps = max(1, math.floor(self.flops / training_flops(self.settings("none"), 1)))
        arms = [Arm("none", "tokens", steps)]
        for dense, seconds in self.step_seconds.items():
            if dense == "none":
                continue
            in_time = steps * self.step_seconds["none"] / seconds
            arms += [Arm(dense, "tokens", steps), Arm(dense, "wall", max(1, round(in_time)))]
        return arms

    def config(self, arm: Arm, seed: int, out: Path) -> RunConfig:
        """The settings of one run. Two arms of the same model and length are one run, and share a folder."""
        return run_config(self.settings(arm.dense), DENSE_BASELINES[arm.dense], arm.steps, seed, out)

    def save(self, path: Path, asked: dict[str, Any]) -> None:
        """Write the plan and the request `asked`. A later call compares its own request with it."""
        document = {
            "asked": asked,
            "base": self.base.to_dict(),
            "flops": self.flops,
            "step_seconds": self.step_seconds,
            "steps": {arm.name: arm.steps for arm in self.arms()},
            "tuning": None if self.tuning is None else self.tuning.to_json(),
            "machine": machine.describe(),
        }
        write_atomically(path, json_text(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """The saved plan. None if only the request has been written."""
        document = json.loads(path.read_text(encoding="utf-8"))
        if "step_seconds" not in document:
            return None
        found = document.get("tuning")
        tuning = None if found is None else Tuning.from_json(found)
        return cls(RunConfig.from_dict(document["base"]), document["flops"], document["step_seconds"], tuning)


def runs(plan: Plan, seeds: int, out: Path) -> Iterator[tuple[Arm, int, RunConfig]]:
    """Every run of the comparison, seed by seed."""
    for seed in range(seeds):
        for arm in plan.arms():
            yield arm, seed, plan.config(arm, seed, out)
