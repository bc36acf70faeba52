"""A fair comparison of a mixture of experts with its dense baselines, over seeds.

One baseline has the same active parameters, the other the same total. The rest of the recipe is the same. Each
baseline is trained twice: for as many tokens as the mixture, and for as much time as the mixture. So the step times of
the models are measured in turn before the training. The numbers of steps follow from them. Before that,
`tuning.py` can choose the learning rate, the depth and the attention heads of each side. A second mixture, chosen for
its time, stands beside the baselines of the same time. The whole runs are scored once, at their last step, on
a text that no choice has seen.

    OUT/plan.json                          the request, the measured step times, the steps of each arm, the search
    OUT/dense-active-500-steps-seed-0/     ordinary runs of `train.py`
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from suites.dense_baselines import DENSE_BASELINES, dense_baseline
from suites.random_tokens import RandomTokenTrainer
from suites.request import describe_machine

from comparison.plots import comparison_figures
from comparison.report import IN_BRACKETS, Interval, Report, apart, difference_in_words, paired, t_interval
from comparison.study_runs import BITS, run_config
from comparison.tuning import MIXTURE, Basis, Side, Tuning, sides
from moe_jax.config import Dense, RunConfig
from moe_jax.model.costs import training_flops
from moe_jax.system.files import json_text, write_atomically
from moe_jax.system.machine import alternate

ROUNDS = 9
"""Steps of each model that are timed."""


class Arm(NamedTuple):
    """One kind of run, trained once for each seed."""

    dense: Dense
    basis: Basis
    """The budget that is the same as the mixture's: tokens, or wall-clock time."""
    steps: int

    @property
    def side(self) -> Side:
        return Side(self.dense, self.basis)

    @property
    def name(self) -> str:
        return self.side.name


@dataclass(frozen=True)
class Plan:
    """The models to train, and the number of steps of each."""

    base: RunConfig
    """The configuration of the mixture, with its vocabulary size. Each run replaces seed, steps and folder."""
    flops: float
    step_seconds: dict[str, float]
    """Median time of one step of each side, by its name, the mixture first. They are measured in turn."""
    tuning: Tuning | None = None
    """The search for each side's settings. None: all have those of `base`."""

    @classmethod
    def make(cls, base: RunConfig, flops: float, tuning: Tuning | None, models: Sequence[Dense]) -> "Plan":
        """Measure the step times of the models: the mixture, "none", and its baselines."""
        unmeasured = cls(base, flops, {}, tuning)
        # Without a search, the mixture for the same time would be the mixture for the same tokens.
        wanted = [side for side in sides(models) if tuning or side == MIXTURE or side.dense != "none"]
        settings = {side.name: unmeasured.settings(side) for side in wanted}
        seconds = step_seconds(dict.fromkeys(settings.values()))
        return dataclasses.replace(unmeasured, step_seconds={name: seconds[own] for name, own in settings.items()})

    def settings(self, side: Side) -> RunConfig:
        """The settings of a side, as they were chosen for it."""
        plain = dense_baseline(self.base, side.dense)
        return plain if self.tuning is None else self.tuning.chosen(side).apply(plain)

    def arms(self) -> list[Arm]:
        """The arms, the mixture first. Its steps are the budget divided by the operations of one step, rounded down."""
        steps = max(1, math.floor(self.flops / training_flops(self.settings(MIXTURE), 1)))
        in_time = {
            name: max(1, round(steps * self.step_seconds[MIXTURE.name] / s)) for name, s in self.step_seconds.items()
        }
        measured = [side for side in sides(list(DENSE_BASELINES)) if side.name in self.step_seconds]
        return [Arm(*side, steps if side.basis == "tokens" else in_time[side.name]) for side in measured]

    def config(self, arm: Arm, seed: int, out: Path) -> RunConfig:
        """The settings of one run. Two arms of the same settings and length are one run, and share a folder."""
        name, settings = DENSE_BASELINES[arm.dense], self.settings(arm.side)
        if self.tuning is None:
            return run_config(settings, name, arm.steps, seed, out)
        return run_config(settings, f"{name}-{self.tuning.chosen(arm.side).name}", arm.steps, seed, out, evaluations=1)

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
            "machine": describe_machine(),
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


def step_seconds(models: Iterable[RunConfig]) -> dict[RunConfig, float]:
    """The median time of a step of each model. They are measured in turn."""
    named = {f"{n}": config for n, config in enumerate(models)}
    times = alternate(
        {n: RandomTokenTrainer.of(c, c.train.batch_size, c.train.grad_accum) for n, c in named.items()}, ROUNDS
    )
    return {config: times[n].median for n, config in named.items()}


@cache
def step_ratio(first: RunConfig, second: RunConfig) -> float:
    """The time of a step of the first model, divided by that of the second."""
    seconds = step_seconds([first, second])
    return seconds[first] / seconds[second]


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
    return [ArmResult(arm, summaries[arm], arm.steps * plan.step_seconds[arm.name]) for arm in plan.arms()]


type Groups = dict[Basis, list[ArmResult]]
"""The results that have one budget in common, the mixture first."""


def grouped(results: Sequence[ArmResult]) -> Groups:
    """The results by what is the same. Without a mixture for the same time, the first result stands in both groups."""
    groups: Groups = {basis: [r for r in results if r.arm.basis == basis] for basis in ("tokens", "wall")}
    if groups["wall"] and groups["wall"][0].arm.dense != "none":
        groups["wall"].insert(0, results[0])
    return groups


def differences(groups: Groups) -> list[Difference]:
    """The difference of every dense arm to the mixture of experts of its group."""
    found = []
    for mixture, *dense in filter(None, groups.values()):
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
    groups = grouped(results)
    found = differences(groups)
    searched, scores = [], sum(len(result.summaries) for result in results)
    if plan.tuning is not None:
        searched = plan.tuning.sentences(plan.base)
        searched.append(f"each whole run was scored once, at its last step: {scores} scores of {plan.base.data.source}")
        if plan.tuning.text == plan.base.data.source:
            searched[-1] += ", on which the settings were chosen too"
    record = {
        "preset": plan.base.preset,
        "data": plan.base.data.source,
        "flops": plan.flops,
        "seeds": len(results[0].summaries),
        "scores": scores,
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
        lambda: comparison_figures(plan, groups, out),
    )
