"""Loss against training operations, for the mixture and its dense baseline of the same active parameters.

Each budget is trained by a run of its own, whose learning rate reaches its final value there. Both models get the same
operations, so the model with the cheaper step takes more steps. A power law is fitted to each model's means over the
seeds, and one to the quotient of the two models' losses.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from suites.dense_baselines import DENSE_BASELINES, dense_baseline

from comparison.plots import scaling_figure
from comparison.power_law import PowerLaw, fit
from comparison.report import IN_BRACKETS, Interval, Report, difference_in_words, paired, t_interval
from comparison.study_runs import BITS, StudyRun, run_config
from moe_jax.config import Dense, RunConfig
from moe_jax.model.costs import training_flops

BUDGETS = 5
SIDES: tuple[Dense, ...] = ("none", "active")


class Budget(NamedTuple):
    """A budget of training operations, and the steps that each model takes for it."""

    flops: float
    steps: dict[Dense, int]


def budgets(base: RunConfig, lowest: float, largest: float) -> list[Budget]:
    """BUDGETS budgets from `lowest` to `largest`, each the same factor above the one before. Steps are rounded down."""
    factor = (largest / lowest) ** (1 / (BUDGETS - 1))
    one = {dense: training_flops(dense_baseline(base, dense), 1) for dense in SIDES}
    found = [lowest * factor**i for i in range(BUDGETS - 1)] + [largest]
    return [Budget(c, {dense: max(1, math.floor(c / one[dense])) for dense in SIDES}) for c in found]


def runs(base: RunConfig, ladder: Sequence[Budget], seeds: int, out: Path) -> list[StudyRun]:
    """Every run: seed by seed, within a seed budget by budget, at each budget the mixture first."""
    found = []
    for seed in range(seeds):
        for budget in ladder:
            for dense in SIDES:
                name = DENSE_BASELINES[dense]
                config = run_config(dense_baseline(base, dense), name, budget.steps[dense], seed, out)
                found.append(StudyRun(f"{name} for {budget.flops:.3g} operations, seed {seed}", config))
    return found


class Side(NamedTuple):
    """The scores of one model at all budgets, and the law that is fitted to their means."""

    dense: Dense
    flops: list[float]
    """Operations of the runs at each budget: at most the budget, by less than a step."""
    bits: list[list[float]]
    """Bits per byte of the seeds at each budget."""
    steps: list[int]

    @property
    def name(self) -> str:
        return DENSE_BASELINES[self.dense]

    @property
    def means(self) -> list[float]:
        return [sum(own) / len(own) for own in self.bits]

    @property
    def law(self) -> PowerLaw:
        return fit(self.flops, self.means)

    def to_json(self, predicted: float) -> dict[str, Any]:
        points = [
            {"steps": s, "training_flops": c, BITS: own, **t_interval(own).to_json()}
            for s, c, own in zip(self.steps, self.flops, self.bits, strict=True)
        ]
        return {
            "model": self.name,
            "points": points,
            "law": self.law.to_json(),
            "prediction": self.law.prediction(predicted).to_json(),
        }


class Scaling(NamedTuple):
    """The results of both models at all budgets."""

    base: RunConfig
    budgets: list[Budget]
    mixture: Side
    baseline: Side
    predicted_flops: float
    """Operations for which the losses are predicted."""

    @classmethod
    def of(
        cls, base: RunConfig, budgets: list[Budget], summaries: Sequence[dict[str, Any]], predicted_flops: float
    ) -> "Scaling":
        """From the summaries of `runs`, in their order."""
        rows, wide = len(budgets), len(SIDES)
        seeds = len(summaries) // (rows * wide)

        def side(place: int) -> Side:
            own = [[summaries[(s * rows + i) * wide + place] for s in range(seeds)] for i in range(rows)]
            flops = [float(one[0]["training_flops"]) for one in own]
            bits = [[summary[BITS] for summary in one] for one in own]
            return Side(SIDES[place], flops, bits, [budget.steps[SIDES[place]] for budget in budgets])

        return cls(base, budgets, side(0), side(1), predicted_flops)

    @property
    def differences(self) -> list[Interval]:
        """At each budget the baseline's bits per byte minus the mixture's, paired by seed."""
        return [paired(*bits) for bits in zip(self.baseline.bits, self.mixture.bits, strict=True)]

    @property
    def quotient(self) -> PowerLaw:
        """The law of the baseline's mean loss divided by the mixture's. What both share at a budget cancels."""
        pairs = zip(self.baseline.means, self.mixture.means, strict=True)
        return fit([budget.flops for budget in self.budgets], [theirs / ours for theirs, ours in pairs])

    def rows(self) -> list[tuple[str, ...]]:
        found = []
        for i, difference in enumerate(self.differences):
            sides = (self.mixture, self.baseline)
            scores = [str(t_interval(side.bits[i])) for side in sides]
            steps = " and ".join(f"{side.steps[i]:,}" for side in sides)
            found.append((f"{self.budgets[i].flops:.3g}", *scores, str(difference), steps))
        return found

    def sentences(self) -> list[str]:
        """The largest budget measured, the laws, and what they predict."""
        flops, at = self.predicted_flops, f"{self.predicted_flops:.3g} operations"
        told = difference_in_words(self.differences[-1], "its dense baseline of the same active parameters")
        found = [f"measured at {self.budgets[-1].flops:.3g} operations: the mixture of experts is {told}"]
        for side in (self.mixture, self.baseline):
            law = side.law
            found.append(
                f"{side.name}: bits per byte fall as C^-b with b = {law.exponent:.4f}, standard error "
                f"{law.exponent_error:.4f}; predicted at {at}: {law.prediction(flops)}"
            )
        quotient = self.quotient.prediction(flops)
        tells = "" if quotient.low > 1 or quotient.high < 1 else "; which model is better there, the fit cannot tell"
        found.append(f"the dense baseline's loss divided by the mixture's, predicted at {at}: {quotient}{tells}")
        found.append("a prediction holds only if the power law goes on; a loss with a floor falls more slowly")
        return found

    def report(self) -> Report:
        """The result with its picture."""
        sides = (self.mixture, self.baseline)
        record = {
            "preset": self.base.preset,
            "data": self.base.data.source,
            "seeds": len(self.mixture.bits[0]),
            "budgets": [budget.flops for budget in self.budgets],
            "predicted_flops": self.predicted_flops,
            "models": [side.to_json(self.predicted_flops) for side in sides],
            "differences": [difference.to_json() for difference in self.differences],
            "quotient": {
                "law": self.quotient.to_json(),
                "prediction": self.quotient.prediction(self.predicted_flops).to_json(),
            },
        }
        scores = {
            f"{side.name}, {budget.flops:.3g} operations": side.bits[i]
            for i, budget in enumerate(self.budgets)
            for side in sides
        }

        names = [f"{side.name}, bits per byte{IN_BRACKETS}" for side in sides]
        headings = ("operations", *names, f"dense minus moe, paired{IN_BRACKETS}", "steps")
        return Report("scaling", headings, self.rows(), self.sentences(), record, scores, self._figures)

    def _figures(self) -> dict[str, Any]:
        return {"scaling": scaling_figure(self)}
