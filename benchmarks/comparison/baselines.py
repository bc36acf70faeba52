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

from comparison.plots import comparison_figures
from comparison.report import IN_BRACKETS, Interval, Report, apart, difference_in_words, paired, t_interval
from comparison.study_runs import BITS, run_config
from comparison.tuning import Tuning
from moe_jax.config import Dense, RunConfig
from moe_jax.config.presets import DENSE_BASELINES, dense_baseline
from moe_jax.model.costs import training_flops
from moe_jax.system import machine
from moe_jax.system.files import json_text, write_atomically
from moe_jax.system.machine import alternate
from moe_jax.training.programs import RandomTokenTrainer

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

    def runs(self, seeds: int, out: Path) -> Iterator[tuple[Arm, int, RunConfig]]:
        """Every run of the comparison, seed by seed."""
        for seed in range(seeds):
            for arm in self.arms():
                yield arm, seed, self.config(arm, seed, out)

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


class ArmResult(NamedTuple):
    """The runs of one arm, seed by seed."""

    arm: Arm
    summaries: list[dict[str, Any]]
    train_seconds: float
    """Number of steps times the median time of one step, from `Plan.step_seconds`. Evaluations are not included."""

    @property
    def bits(self) -> list[float]:
        return [s[BITS] for s in self.summaries]

    def mean(self, name: str) -> float | None:
        """Mean of a number over the summaries. None if no summary has it: dense baselines have no drops."""
        values = [s[name] for s in self.summaries if s[name] is not None]
        return sum(values) / len(values) if values else None

    def to_json(self) -> dict[str, Any]:
        first = self.summaries[0]
        same = {k: first[k] for k in ("steps", "tokens_seen", "training_flops", "params_total", "params_active")}
        return {
            "arm": self.arm.name,
            **same,
            BITS: self.bits,
            **t_interval(self.bits).to_json(),
            "train_seconds": self.train_seconds,
            "wall_seconds": [s["wall_seconds"] for s in self.summaries],
            "train_drop_fraction": self.mean("train_drop_fraction") if self.arm.dense == "none" else None,
            "val_drop_fraction": max(s["val_drop_fraction"] for s in self.summaries),
        }


class Difference(NamedTuple):
    """Bits per byte of a dense arm minus those of the mixture, seed by seed. Above 0 the mixture is better."""

    arm: Arm
    paired: Interval
    apart: bool | None
    """Whether the intervals of the two means do not overlap; None with one seed."""

    @property
    def verdict(self) -> str:
        """The difference in words."""
        baseline = {
            "active": "its dense baseline of the same active parameters",
            "total": "its dense baseline of the same total parameters",
        }
        basis = {"tokens": "at the same tokens", "wall": "at the same wall clock"}
        text = difference_in_words(self.paired, baseline[self.arm.dense])
        start = f"{basis[self.arm.basis]} the mixture of experts is {text}"
        if not self.paired.known or self.paired.low <= 0 <= self.paired.high:
            return start
        words = "intervals of the means are apart" if self.apart else "intervals of the means overlap"
        return f"{start}; the {words}"

    def to_json(self) -> dict[str, Any]:
        named = {"twin": self.arm.dense, "same": self.arm.basis}
        return {**named, **self.paired.to_json(), "apart": self.apart, "verdict": self.verdict}


def collect(plan: Plan, summaries: dict[Arm, list[dict[str, Any]]]) -> list[ArmResult]:
    return [ArmResult(arm, summaries[arm], arm.steps * plan.step_seconds[arm.dense]) for arm in plan.arms()]


def differences(results: Sequence[ArmResult]) -> list[Difference]:
    """The difference of every dense arm to the mixture of experts, which is the first result."""
    mixture, *dense = results
    found = []
    for result in dense:
        separate = apart(t_interval(result.bits), t_interval(mixture.bits))
        found.append(Difference(result.arm, paired(result.bits, mixture.bits), separate))
    return found


HEADINGS = (
    "model",
    "bits per byte" + IN_BRACKETS,
    "parameters",
    "active",
    "tokens",
    "FLOPs",
    "ms a step",
    "training s",
    "drops",
)


def rows(results: Sequence[ArmResult]) -> list[tuple[str, ...]]:
    """The cells of the table. The times are computed from the measured step times, without evaluations."""
    cells = []
    for result in results:
        r = result.to_json()
        drops = "" if r["train_drop_fraction"] is None else f"{r['train_drop_fraction']:.1%}"
        cells.append(
            (
                result.arm.name,
                str(t_interval(result.bits)),
                f"{r['params_total'] / 1e6:.2f} M",
                f"{r['params_active'] / 1e6:.2f} M",
                f"{r['tokens_seen'] / 1e6:.2f} M",
                f"{r['training_flops']:.3g}",
                f"{1e3 * result.train_seconds / result.arm.steps:.1f}",
                f"{result.train_seconds:.0f}",
                drops,
            )
        )
    return cells


def report(plan: Plan, results: Sequence[ArmResult], out: Path) -> Report:
    """The result of the whole comparison. `out` has the runs, whose curves are drawn."""
    found = differences(results)
    searched = [] if plan.tuning is None else plan.tuning.sentences()
    record = {
        "preset": plan.base.preset,
        "data": plan.base.data.source,
        "flops": plan.flops,
        "seeds": len(results[0].summaries),
        "tuning": None if plan.tuning is None else plan.tuning.to_json(),
        "arms": [result.to_json() for result in results],
        "differences": [difference.to_json() for difference in found],
    }

    return Report(
        "comparison",
        HEADINGS,
        rows(results),
        [*searched, *(difference.verdict for difference in found)],
        record,
        {result.arm.name: result.bits for result in results},
        lambda: comparison_figures(plan, results, out),
    )
