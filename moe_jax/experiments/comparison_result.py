"""The result of a comparison: the arms with their intervals, the differences, a table and verdicts in words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.experiments.comparison import Arm, Plan
from moe_jax.experiments.intervals import IN_BRACKETS, Interval, apart, difference_in_words, paired, t_interval
from moe_jax.experiments.report import Figures, Report
from moe_jax.experiments.study_runs import BITS


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


def report(plan: Plan, results: Sequence[ArmResult], figures: Figures) -> Report:
    """The result of the whole comparison."""
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
        figures,
    )
