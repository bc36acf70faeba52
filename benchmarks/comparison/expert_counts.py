"""Loss against the number of experts, at the same active experts, beside the dense baseline.

K and F stay those of the preset, so a token uses the same parameters, except those of the router: D E in each layer.
All models train for the same tokens: for as many steps as the budget buys the preset's own mixture.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comparison.plots import experts_figure
from comparison.report import IN_BRACKETS, Interval, Report, difference_in_words, paired, t_interval
from comparison.study_runs import BITS, StudyRun, run_config
from moe_jax.config import RunConfig
from moe_jax.config.presets import DENSE_BASELINES, dense_baseline
from moe_jax.model.costs import training_flops


class Models(NamedTuple):
    """The models to train."""

    base: RunConfig
    """The preset, with its vocabulary size."""
    counts: tuple[int, ...]
    """Numbers of experts, ascending."""
    steps: int
    """Steps of every run."""

    @classmethod
    def of(cls, base: RunConfig, counts: Sequence[int], flops: float) -> "Models":
        steps = max(1, math.floor(flops / training_flops(base, 1)))
        return cls(base, tuple(sorted(counts)), steps)

    def settings(self) -> dict[str, RunConfig]:
        """Name -> settings, the dense baseline first, then the mixtures by their number of experts."""
        found = {DENSE_BASELINES["active"]: dense_baseline(self.base, "active")}
        for count in self.counts:
            found[f"moe-{count}-experts"] = with_experts(self.base, count)
        return found

    def runs(self, seeds: int, out: Path) -> list[StudyRun]:
        """Every run, seed by seed."""
        return [
            StudyRun(f"{name}, seed {seed}", run_config(settings, name, self.steps, seed, out))
            for seed in range(seeds)
            for name, settings in self.settings().items()
        ]


def with_experts(base: RunConfig, count: int) -> RunConfig:
    """The same settings with another number of experts. Raises FieldError if K is larger."""
    return dataclasses.replace(base, model=dataclasses.replace(base.model, experts=count))


class ModelResult(NamedTuple):
    """The runs of one model, seed by seed."""

    name: str
    experts: int | None
    """None for the dense baseline."""
    summaries: list[dict[str, Any]]

    @property
    def bits(self) -> list[float]:
        return [summary[BITS] for summary in self.summaries]

    @property
    def drops(self) -> float | None:
        """Mean share of the choices that were dropped in training. None for the dense baseline."""
        if self.experts is None:
            return None
        return sum(summary["train_drop_fraction"] for summary in self.summaries) / len(self.summaries)

    def to_json(self) -> dict[str, Any]:
        same = ("steps", "tokens_seen", "training_flops", "params_total", "params_active")
        own = {"model": self.name, "experts": self.experts, "train_drop_fraction": self.drops}
        own |= {name: self.summaries[0][name] for name in same}
        return own | {BITS: self.bits, **t_interval(self.bits).to_json()}


class ExpertCounts(NamedTuple):
    """The results of all models."""

    models: Models
    baseline: ModelResult
    mixtures: list[ModelResult]

    @classmethod
    def of(cls, models: Models, summaries: Sequence[dict[str, Any]]) -> "ExpertCounts":
        """From the summaries of `Models.runs`, in their order."""
        names = list(models.settings())
        own = [list(summaries[i :: len(names)]) for i in range(len(names))]
        counts = (None, *models.counts)
        baseline, *mixtures = (ModelResult(*all_of) for all_of in zip(names, counts, own, strict=True))
        return cls(models, baseline, mixtures)

    def difference(self, mixture: ModelResult) -> Interval:
        """The dense baseline's bits per byte minus the mixture's, paired by seed."""
        return paired(self.baseline.bits, mixture.bits)

    def rows(self) -> list[tuple[str, ...]]:
        found = []
        for result in (self.baseline, *self.mixtures):
            r = result.to_json()
            found.append(
                (
                    result.name,
                    str(t_interval(result.bits)),
                    "" if result.experts is None else str(self.difference(result)),
                    f"{r['params_total'] / 1e6:.2f} M",
                    f"{r['params_active'] / 1e6:.2f} M",
                    f"{r['tokens_seen'] / 1e6:.2f} M",
                    f"{r['training_flops']:.3g}",
                    "" if result.drops is None else f"{result.drops:.1%}",
                )
            )
        return found

    def sentences(self) -> list[str]:
        """The difference of every mixture to the dense baseline, in words."""
        baseline = "the dense baseline of the same active parameters"
        return [
            f"with {result.experts} experts the mixture is {difference_in_words(self.difference(result), baseline)}"
            for result in self.mixtures
        ]

    def report(self) -> Report:
        """The result with its picture."""
        base = self.models.base
        record = {
            "preset": base.preset,
            "data": base.data.source,
            "seeds": len(self.baseline.summaries),
            "steps": self.models.steps,
            "top_k": base.model.routing.top_k,
            "models": [result.to_json() for result in (self.baseline, *self.mixtures)],
            "differences": [
                {"experts": result.experts, **self.difference(result).to_json()} for result in self.mixtures
            ],
        }

        scores = {result.name: result.bits for result in (self.baseline, *self.mixtures)}
        return Report("experts", HEADINGS, self.rows(), self.sentences(), record, scores, self._figures)

    def _figures(self) -> dict[str, Any]:
        return {"experts": experts_figure(self)}


HEADINGS = (
    "model",
    "bits per byte" + IN_BRACKETS,
    "dense minus it, paired" + IN_BRACKETS,
    "parameters",
    "active",
    "tokens",
    "FLOPs",
    "drops",
)
