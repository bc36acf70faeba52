"""The best learning rate and depth of each side of a comparison, by a search of equal cost for each side.

The sides are the mixture and its dense baselines. Each side first tries the learning rates of RATES. While the best of
them is the lowest or the highest for any side, all sides try the next one beyond. With its best rate each side then
tries one layer fewer and one more. All short runs have SEED, which no run of the comparison has, and SHARE of the
operations of the comparison's budget. Their learning rate reaches its final value at their own last step.

The best rate falls with the length of a run. So the runs of the comparison have the best rate of the short runs times
FOR_WHOLE_RUNS.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comparison.study_runs import BITS, StudyRun, run_config
from moe_jax.config import Dense, RunConfig
from moe_jax.config.presets import DENSE_BASELINES, dense_baseline
from moe_jax.model.costs import training_flops

RATES = (0.5, 1.0, 2.0)
"""The first factors on the preset's learning rates, that of Muon included."""
LOWEST_RATE, HIGHEST_RATE = 0.125, 8.0
"""The factors beyond which none is tried."""
DEPTHS = (-1, 1)
"""Layers more than the preset has."""
SHARE = 0.2
"""Operations of a short run, divided by the budget of the comparison."""
LENGTH_EXPONENT = 0.32
"""How the best learning rate falls: as (tokens of a run)^-0.32, for AdamW (Bjorck et al. 2024, "Scaling Optimal LR
Across Token Horizons"). `benchmarks/quality.md` compares this with runs by Muon."""
FOR_WHOLE_RUNS = SHARE**LENGTH_EXPONENT
"""The rate of whole runs, divided by the best rate of the short ones: about 0.6."""
SEED = 1000
"""Seed of the short runs. The seeds of a comparison are 0 to 999."""
LARGEST_MISMATCH = 0.01
"""Largest relative difference between the operations of a step at another depth and at the preset's depth."""

LARGEST_HIDDEN = 2**17
"""Largest `expert_hidden` that the configuration takes."""

Train = Callable[[Sequence[StudyRun]], list[dict[str, Any]]]
"""Trains runs, and returns their summaries in the same order."""


class Candidate(NamedTuple):
    """Settings that a side may get."""

    rate: float
    """Factor on the learning rates."""
    layers: int
    expert_hidden: int
    """F of the mixture. The hidden width of a dense baseline follows from it (`ModelConfig.dense_hidden`)."""

    def apply(self, side: RunConfig) -> RunConfig:
        """The side with these settings."""
        train = dataclasses.replace(side.train, lr=self.rate * side.train.lr, muon_lr=self.rate * side.train.muon_lr)
        model = dataclasses.replace(side.model, layers=self.layers, expert_hidden=self.expert_hidden)
        return dataclasses.replace(side, model=model, train=train)


class Trial(NamedTuple):
    """A short run of a side, and its score."""

    dense: Dense
    candidate: Candidate
    steps: int
    flops: float
    """Operations of the run."""
    bits: float
    """Bits per byte of the whole validation stream."""

    def to_json(self) -> dict[str, Any]:
        own = {"model": DENSE_BASELINES[self.dense], "dense": self.dense, **self.candidate._asdict()}
        return own | {"steps": self.steps, "training_flops": self.flops, BITS: self.bits}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Trial":
        candidate = Candidate(found["rate"], found["layers"], found["expert_hidden"])
        return cls(found["dense"], candidate, found["steps"], found["training_flops"], found[BITS])


class Tuning(NamedTuple):
    """The trials of all sides, in the order in which they were trained."""

    trials: tuple[Trial, ...]
    for_whole_runs: float = FOR_WHOLE_RUNS
    """Rate of a side's whole runs, divided by the best rate of its short runs.""" ""

    @property
    def models(self) -> list[Dense]:
        """The sides, in the order in which they were trained."""
        return list(dict.fromkeys(trial.dense for trial in self.trials))

    @property
    def rates(self) -> list[float]:
        """The factors on the learning rates that were tried, ascending."""
        return sorted({trial.candidate.rate for trial in self.trials})

    def rates_beyond(self) -> list[float]:
        """Half of the lowest rate and twice the highest one, each if the rate beside it is the best for any side."""
        best = {self.best(dense).candidate.rate for dense in self.models}
        lowest, highest = self.rates[0], self.rates[-1]
        beyond = [lowest / 2] * (lowest in best) + [2 * highest] * (highest in best)
        return [rate for rate in beyond if LOWEST_RATE <= rate <= HIGHEST_RATE]

    def of(self, dense: Dense) -> list[Trial]:
        return [trial for trial in self.trials if trial.dense == dense]

    def best(self, dense: Dense) -> Trial:
        """The trial of a side with the lowest score; of equal ones the first."""
        return min(self.of(dense), key=lambda trial: trial.bits)

    def chosen(self, dense: Dense) -> Candidate:
        """The settings of a side in whole runs."""
        best = self.best(dense).candidate
        return best._replace(rate=self.for_whole_runs * best.rate)

    def sentences(self) -> list[str]:
        """The choice of each side and the cost of the search, in words."""
        sides = self.models
        runs = len(self.trials) // len(sides)
        cost = sum(trial.flops for trial in self.trials)
        found = [
            f"the search: {runs} short runs for each of {len(sides)} sides, seed {SEED}, each of {SHARE:.0%} of the "
            f"budget; {cost:.3g} operations in all"
        ]
        for dense in sides:
            name, best = DENSE_BASELINES[dense], self.best(dense)
            c, rates = best.candidate, {trial.candidate.rate for trial in self.of(dense)}
            text = f"{name}: learning rate {c.rate:g} x the preset's, {c.layers} layers, hidden width of an expert "
            text += f"{c.expert_hidden}; {best.bits:.4f} bits per byte in its short run"
            if c.rate in (min(rates), max(rates)):
                text += "; no rate beyond this one was tried, and it may be better"
            text += f"; in whole runs the learning rate is {self.chosen(dense).rate:.3g} x the preset's"
            found.append(text)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "rates": self.rates,
            "share_of_budget": SHARE,
            "seed": SEED,
            "rate_factor_for_whole_runs": self.for_whole_runs,
            "training_flops": sum(trial.flops for trial in self.trials),
            "chosen": {DENSE_BASELINES[dense]: self.best(dense).to_json() for dense in self.models},
            "trials": [trial.to_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Tuning":
        trials = tuple(Trial.from_json(trial) for trial in found["trials"])
        return cls(trials, found["rate_factor_for_whole_runs"])


def search(base: RunConfig, flops: float, out: Path, models: Sequence[Dense], train: Train) -> Tuning:
    """Train the short runs of all `models` for a budget of `flops` operations. Raises what `train` raises.

    A rate is tried for every side or for none, and so is a depth. So each side has the same number of short runs.
    """
    sides: dict[Dense, RunConfig] = {dense: dense_baseline(base, dense) for dense in models}
    start: dict[Dense, Candidate] = {
        dense: Candidate(1.0, side.model.layers, side.model.expert_hidden) for dense, side in sides.items()
    }
    by_rate, next_rates = Tuning(()), list(RATES)
    while next_rates:
        rates: list[tuple[Dense, Candidate]] = [
            (dense, start[dense]._replace(rate=rate)) for dense in sides for rate in next_rates
        ]
        by_rate = Tuning(by_rate.trials + _trials(sides, rates, flops, out, train))
        next_rates = by_rate.rates_beyond()
    depths: list[tuple[Dense, Candidate]] = []
    for more in DEPTHS:
        hidden: dict[Dense, int | None] = {
            dense: hidden_at_depth(side, base.model.layers + more) for dense, side in sides.items()
        }
        for dense, width in hidden.items():
            if width is not None and None not in hidden.values():
                rate = by_rate.best(dense).candidate.rate
                depths.append((dense, Candidate(rate, base.model.layers + more, width)))
    return Tuning(by_rate.trials + _trials(sides, depths, flops, out, train))


def hidden_at_depth(side: RunConfig, layers: int) -> int | None:
    """`expert_hidden` with which a step at `layers` layers has as many operations as a step of `side`.

    The nearest whole number is taken. None if its operations differ by more than LARGEST_MISMATCH.
    """
    if layers < 1:
        return None
    aim = training_flops(side, 1)

    def flops(hidden: int) -> int:
        return training_flops(Candidate(1.0, layers, hidden).apply(side), 1)

    widths = range(1, LARGEST_HIDDEN + 1)
    above = bisect.bisect_left(widths, aim, key=flops)
    near = min(widths[max(0, above - 1) : above + 1], key=lambda hidden: abs(flops(hidden) - aim))
    return near if abs(flops(near) - aim) <= LARGEST_MISMATCH * aim else None


def _trials(
    sides: dict[Dense, RunConfig],
    candidates: Sequence[tuple[Dense, Candidate]],
    flops: float,
    out: Path,
    train: Train,
) -> tuple[Trial, ...]:
    runs = []
    for dense, candidate in candidates:
        settings = candidate.apply(sides[dense])
        steps = max(1, math.floor(SHARE * flops / training_flops(settings, 1)))
        name = f"tune-{DENSE_BASELINES[dense]}-rate-{candidate.rate:g}-{candidate.layers}-layers"
        title = f"search, {DENSE_BASELINES[dense]}, {candidate.rate:g} x the learning rate, {candidate.layers} layers"
        runs.append(StudyRun(title, run_config(settings, name, steps, SEED, out)))
    return tuple(
        Trial(dense, candidate, run.config.train.steps, summary["training_flops"], summary[BITS])
        for (dense, candidate), run, summary in zip(candidates, runs, train(runs), strict=True)
    )
