"""The fair comparison: a mixture of experts beside its dense twins, over seeds.

The twins have the same active parameters, or the same total, and everything else of the recipe. They are trained for
as many tokens as the mixture, and again for as many as its training time buys them. For that the step times of all
three are measured in turn, before anything is trained, and the number of steps is chosen from them: so each run knows
its end, and its schedule comes to it.

    OUT/plan.json                          what was asked for, the measured step times, steps of each arm
    OUT/dense-active-500-steps-seed-0/     ordinary runs of `train.py`

A run that is finished is not trained again, and one that was stopped goes on: calling again completes a comparison.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from moe_jax.analysis.accounting import training_flops
from moe_jax.analysis.bench import machine
from moe_jax.analysis.bench.timing import alternate
from moe_jax.analysis.bench.training import Trainer
from moe_jax.config import Dense, RunConfig, load_config
from moe_jax.data.token_store import prepare
from moe_jax.training.loop import Session, finish, train
from moe_jax.training.run import locked, write_atomically
from moe_jax.training.signals import Signals

Basis = Literal["tokens", "wall"]
MODELS: dict[Dense, str] = {"none": "moe", "active": "dense-active", "total": "dense-total"}
ROUNDS = 9
"""Steps of each model that are timed."""
EVALUATIONS = 10
"""Of each run, evenly spaced; the best of them is what counts, as in every run."""


class Arm(NamedTuple):
    """One kind of run, trained once a seed."""

    dense: Dense
    basis: Basis
    """What it has as much of as the mixture of experts: tokens, or time."""
    steps: int

    @property
    def name(self) -> str:
        return MODELS[self.dense] if self.dense == "none" else f"{MODELS[self.dense]}, same {self.basis}"


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    base: RunConfig
    """Of the mixture of experts, its vocabulary known; seed, steps and folder are each run's own."""
    flops: float
    step_seconds: dict[Dense, float]
    """Medians of one step's time, measured in turn."""

    @classmethod
    def make(cls, asked: RunConfig, flops: float) -> "Plan":
        """Prepare the data and measure."""
        size = prepare(asked.data, seq_len=asked.model.seq_len).tokenizer.vocab_size
        base = dataclasses.replace(
            asked, model=dataclasses.replace(asked.model, vocab_size=asked.model.vocab_size or size)
        )
        train = base.train
        trainers = {
            MODELS[dense]: Trainer.of(twin(base, dense), train.batch_size, train.grad_accum) for dense in MODELS
        }
        times = alternate(dict(trainers), ROUNDS)
        return cls(base, flops, {dense: times[name].median for dense, name in MODELS.items()})

    def arms(self) -> list[Arm]:
        """The mixture first; the number of its steps is what the budget buys, rounded down."""
        steps = max(1, math.floor(self.flops / training_flops(self.base, 1)))
        arms = [Arm("none", "tokens", steps)]
        for dense in ("active", "total"):
            in_time = steps * self.step_seconds["none"] / self.step_seconds[dense]
            arms += [Arm(dense, "tokens", steps), Arm(dense, "wall", max(1, round(in_time)))]
        return arms

    def config(self, arm: Arm, seed: int, out: Path) -> RunConfig:
        """The settings of one run. Two arms of the same model and length are one run, and share a folder."""
        model = twin(self.base, arm.dense).model
        each = math.ceil(arm.steps / EVALUATIONS)
        train = dataclasses.replace(
            self.base.train, steps=arm.steps, seed=seed, eval_every=each, save_every=each, patience=0
        )
        folder = out / f"{MODELS[arm.dense]}-{arm.steps}-steps-seed-{seed}"
        return dataclasses.replace(self.base, out=str(folder), model=model, train=train)

    def save(self, path: Path, asked: dict[str, Any]) -> None:
        """Write the plan, and what was `asked` for, by which a later call knows that it is the same comparison."""
        document = {
            "asked": asked,
            "base": self.base.to_dict(),
            "flops": self.flops,
            "step_seconds": self.step_seconds,
            "steps": {arm.name: arm.steps for arm in self.arms()},
            "machine": machine.describe(),
        }
        write_atomically(path, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(RunConfig.from_dict(document["base"]), document["flops"], document["step_seconds"])


def twin(config: RunConfig, dense: Dense) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dense=dense))


def runs(plan: Plan, seeds: int, out: Path) -> Iterator[tuple[Arm, int, RunConfig]]:
    """Every run of the comparison, seed by seed."""
    for seed in range(seeds):
        for arm in plan.arms():
            yield arm, seed, plan.config(arm, seed, out)


def train_run(config: RunConfig, signals: Signals) -> dict[str, Any]:
    """The summary of a run, which is trained as far as it is not yet. Raises Stopped, UserError."""
    folder = Path(config.run_dir)
    done = finished(folder, config.train.steps)
    if done is not None:
        return done
    with locked(folder):
        session = Session.open(config, load_config(folder))
        train(session, signals)
        result = finish(session)
    jax.clear_caches()  # the next run compiles programs of its own
    return result


def finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that came to its end and was scored on the whole validation stream, else None."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if summary["val_whole_stream"] and summary["steps"] == steps else None
