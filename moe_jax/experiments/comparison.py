"""A fair comparison of a mixture of experts with its dense baselines, over seeds.

One baseline has the same active parameters, the other the same total. The rest of the recipe is the same. Each
baseline is trained twice: for as many tokens as the mixture, and for as much time as the mixture. So the step times of
the three models are measured in turn before the training. The numbers of steps follow from them. Each run knows its
last step from the start, so its learning rate reaches its final value there.

    OUT/plan.json                          the request, the measured step times, the steps of each arm
    OUT/dense-active-500-steps-seed-0/     ordinary runs of `train.py`

A finished run is not trained again, and a stopped run goes on. So calling again completes a comparison.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from moe_jax.config import Dense, RunConfig, load_config
from moe_jax.config.baselines import DENSE_BASELINES, dense_baseline
from moe_jax.data.token_store import prepare_token_store
from moe_jax.model.costs import training_flops
from moe_jax.runs.folder import locked_for_training
from moe_jax.runs.summary import read_summary
from moe_jax.system import machine
from moe_jax.system.files import write_atomically
from moe_jax.system.json_text import json_text
from moe_jax.system.signals import Signals
from moe_jax.system.timing import alternate
from moe_jax.training.loop import finish, train
from moe_jax.training.random_tokens import RandomTokenTrainer
from moe_jax.training.session import Session

Basis = Literal["tokens", "wall"]
ROUNDS = 9
"""Steps of each model that are timed."""
EVALUATIONS = 10
"""Evaluations of each run, evenly spaced. As in every run, the checkpoint with the best evaluation is the result."""


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
    """Median time of one step of each model. The models are measured in turn."""

    @classmethod
    def make(cls, asked: RunConfig, flops: float) -> "Plan":
        """Prepare the data and measure the step times."""
        size = prepare_token_store(asked.data, seq_len=asked.model.seq_len).tokenizer.vocab_size
        base = dataclasses.replace(
            asked, model=dataclasses.replace(asked.model, vocab_size=asked.model.vocab_size or size)
        )
        train = base.train
        trainers = {
            DENSE_BASELINES[dense]: RandomTokenTrainer.of(
                dense_baseline(base, dense), train.batch_size, train.grad_accum
            )
            for dense in DENSE_BASELINES
        }
        times = alternate(dict(trainers), ROUNDS)
        return cls(base, flops, {dense: times[name].median for dense, name in DENSE_BASELINES.items()})

    def arms(self) -> list[Arm]:
        """The arms, the mixture first. Its steps are the budget divided by the operations of one step, rounded down."""
        steps = max(1, math.floor(self.flops / training_flops(self.base, 1)))
        arms = [Arm("none", "tokens", steps)]
        for dense in ("active", "total"):
            in_time = steps * self.step_seconds["none"] / self.step_seconds[dense]
            arms += [Arm(dense, "tokens", steps), Arm(dense, "wall", max(1, round(in_time)))]
        return arms

    def config(self, arm: Arm, seed: int, out: Path) -> RunConfig:
        """The settings of one run. Two arms of the same model and length are one run, and share a folder."""
        model = dense_baseline(self.base, arm.dense).model
        each = math.ceil(arm.steps / EVALUATIONS)
        train = dataclasses.replace(
            self.base.train, steps=arm.steps, seed=seed, eval_every=each, save_every=each, patience=0
        )
        folder = out / f"{DENSE_BASELINES[arm.dense]}-{arm.steps}-steps-seed-{seed}"
        return dataclasses.replace(self.base, out=str(folder), model=model, train=train)

    def save(self, path: Path, asked: dict[str, Any]) -> None:
        """Write the plan and the request `asked`. A later call compares its own request with it."""
        document = {
            "asked": asked,
            "base": self.base.to_dict(),
            "flops": self.flops,
            "step_seconds": self.step_seconds,
            "steps": {arm.name: arm.steps for arm in self.arms()},
            "machine": machine.describe(),
        }
        write_atomically(path, json_text(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(RunConfig.from_dict(document["base"]), document["flops"], document["step_seconds"])


def runs(plan: Plan, seeds: int, out: Path) -> Iterator[tuple[Arm, int, RunConfig]]:
    """Every run of the comparison, seed by seed."""
    for seed in range(seeds):
        for arm in plan.arms():
            yield arm, seed, plan.config(arm, seed, out)


def train_run(config: RunConfig, signals: Signals) -> dict[str, Any]:
    """Train a run, or the rest of it, and return its summary. Raises Stopped, UserError."""
    folder = Path(config.run_dir)
    done = finished(folder, config.train.steps)
    if done is not None:
        return done
    with locked_for_training(folder) as lock:
        session = Session.open(config, load_config(folder), lock)
        train(session, signals)
        result = finish(session)
    jax.clear_caches()  # the next run compiles its own programs
    return result


def finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that reached its last step and was scored on the whole validation stream, else None."""
    summary = read_summary(folder)
    whole = summary.get("val_whole_stream") is True and summary.get("steps") == steps
    return summary if whole and all(summary.get(name) is not None for name in _NEEDED) else None


_NEEDED = (
    *("val_bits_per_byte", "val_drop_fraction", "wall_seconds", "tokens_seen"),
    *("training_flops", "params_total", "params_active"),
)
"""What the result of a comparison takes from the summary of a run."""
