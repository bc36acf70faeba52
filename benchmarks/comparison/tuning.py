"""The best learning rate, depth and number of attention heads of each side of a comparison.

The mixture and each dense baseline are searched for twice: for the same tokens, and for the same time. Each of these
sides searches by the same rule. It starts with the preset's settings and tries the two neighbours along one line after
another. Where a neighbour is better, the next one beyond it is tried too, until it gets worse or the line ends:

    rate    half and twice the learning rates
    layers  one layer fewer and one more; the hidden width changes, so that a step has as many operations
    heads   half and twice as many attention heads, with as many operations

The first side is the mixture whose short runs have SHARE of the operations of the comparison's budget. The other
sides' short runs have the tokens or the time of its best one. So the mixture for the same time may be a faster one. All
have SEED, which no run of the comparison has. Their learning rate reaches its final value at their own last step. They
are scored on a part of the training text (`text_to_choose_on`), so no choice sees the text that scores the whole runs.

The best rate falls with the length of a run. So the runs of the comparison have the best rate of the short runs times
FOR_WHOLE_RUNS.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from suites.dense_baselines import DENSE_BASELINES, dense_baseline

from comparison.study_runs import BITS, StudyRun, run_config
from moe_jax.config import Dense, RunConfig
from moe_jax.data.corpora import source_files
from moe_jax.model.costs import training_flops

LOWEST_RATE, HIGHEST_RATE = 0.125, 8.0
"""The factors on the preset's learning rates beyond which none is tried."""
SHARE = 0.2
"""Operations of a short run of the mixture, divided by the budget of the comparison."""
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

Basis = Literal["tokens", "wall"]
Train = Callable[[Sequence[StudyRun]], list[dict[str, Any]]]
"""Trains runs, and returns their summaries in the same order."""
Ratio = Callable[[RunConfig, RunConfig], float]
"""The time of a step of the first settings, divided by that of the second, measured in turn."""


class Side(NamedTuple):
    """A model, and the budget that it has in common with MIXTURE: tokens, or wall-clock time."""

    dense: Dense
    basis: Basis

    @property
    def name(self) -> str:
        name = DENSE_BASELINES[self.dense]
        return name if self == MIXTURE else f"{name}, same {self.basis}"


MIXTURE = Side("none", "tokens")
"""The side that sets the tokens and the time."""


def sides(models: Sequence[Dense]) -> list[Side]:
    """The sides of a comparison of `models`, MIXTURE first."""
    bases: tuple[Basis, Basis] = ("tokens", "wall")
    every = [Side(dense, basis) for dense in models for basis in bases]
    return [MIXTURE, *(side for side in every if side != MIXTURE)]


class Candidate(NamedTuple):
    """Settings that a side may get."""

    rate: float
    """Factor on the learning rates."""
    layers: int
    heads: int
    """Attention heads. The heads for keys and values change by the same factor."""
    expert_hidden: int
    """F of the mixture. The hidden width of a dense baseline follows from it (`ModelConfig.dense_hidden`)."""

    @classmethod
    def of(cls, side: RunConfig) -> "Candidate":
        return cls(1.0, side.model.layers, side.model.heads, side.model.expert_hidden)

    def apply(self, side: RunConfig) -> RunConfig:
        """The side with these settings."""
        train = dataclasses.replace(side.train, lr=self.rate * side.train.lr, muon_lr=self.rate * side.train.muon_lr)
        keys = side.model.kv_heads * self.heads // side.model.heads
        shape = {"layers": self.layers, "heads": self.heads, "kv_heads": keys, "expert_hidden": self.expert_hidden}
        return dataclasses.replace(side, model=dataclasses.replace(side.model, **shape), train=train)

    @property
    def name(self) -> str:
        return f"rate-{self.rate:g}-{self.layers}-layers-{self.heads}-heads"


class Move(Protocol):
    """The next candidate along a line, up or down. None where the line ends."""

    def __call__(self, side: RunConfig, at: Candidate, up: bool) -> Candidate | None: ...


def next_rate(side: RunConfig, at: Candidate, up: bool) -> Candidate | None:
    rate = at.rate * (2 if up else 0.5)
    return at._replace(rate=rate) if LOWEST_RATE <= rate <= HIGHEST_RATE else None


def next_depth(side: RunConfig, at: Candidate, up: bool) -> Candidate | None:
    layers = at.layers + (1 if up else -1)
    hidden = hidden_at_depth(side, layers)
    return None if hidden is None else at._replace(layers=layers, expert_hidden=hidden)


def next_heads(side: RunConfig, at: Candidate, up: bool) -> Candidate | None:
    """Heads must divide the width into even parts, and a whole number of them share a head for keys and values."""
    heads, model = at.heads * 2 if up else at.heads // 2, side.model
    fits = heads >= 1 and (up or at.heads % 2 == 0) and model.width % (2 * heads) == 0
    return at._replace(heads=heads) if fits and model.kv_heads * heads % model.heads == 0 else None


LINES: dict[str, Move] = {"rate": next_rate, "layers": next_depth, "heads": next_heads}


class Trial(NamedTuple):
    """A short run of a side, and its score."""

    side: Side
    candidate: Candidate
    steps: int
    flops: float
    """Operations of the run."""
    bits: float
    """Bits per byte of the text to choose on."""

    def to_json(self) -> dict[str, Any]:
        own = {"model": self.side.name, **self.side._asdict(), **self.candidate._asdict()}
        return own | {"steps": self.steps, "training_flops": self.flops, BITS: self.bits}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Trial":
        candidate = Candidate(*(found[name] for name in Candidate._fields))
        side = Side(found["dense"], found["basis"])
        return cls(side, candidate, found["steps"], found["training_flops"], found[BITS])


class Tuning(NamedTuple):
    """The trials of all sides, in the order in which they were trained."""

    trials: tuple[Trial, ...]
    text: str
    """The value of `--data` with which the trials were trained and scored."""
    for_whole_runs: float = FOR_WHOLE_RUNS
    """Rate of a side's whole runs, divided by the best rate of its short runs."""

    def of(self, side: Side) -> list[Trial]:
        return [trial for trial in self.trials if trial.side == side]

    def best(self, side: Side) -> Trial:
        """The trial of a side with the lowest score; of equal ones the first."""
        return min(self.of(side), key=lambda trial: trial.bits)

    def chosen(self, side: Side) -> Candidate:
        """The settings of a side in whole runs."""
        best = self.best(side).candidate
        return best._replace(rate=self.for_whole_runs * best.rate)

    def sentences(self, base: RunConfig) -> list[str]:
        """The choice of each side and the cost of the search, in words."""
        cost = sum(trial.flops for trial in self.trials)
        found = [
            f"the search: {len(self.trials)} short runs, seed {SEED}, a fifth as long as the whole ones, scored on "
            f"the validation part of {self.text}; {cost:.3g} operations in all"
        ]
        for side in dict.fromkeys(trial.side for trial in self.trials):
            best = self.best(side)
            c, settings = best.candidate, dense_baseline(base, side.dense)
            text = (
                f"{side.name}: learning rate {c.rate:g} x the preset's, layers: {c.layers}, heads: {c.heads}, hidden "
            )
            text += f"width of an expert {c.expert_hidden}; {best.bits:.4f} bits per byte in its short run, the best "
            text += f"of {len(self.of(side))}"
            for line, move in LINES.items():
                for up, end in ((False, "lowest"), (True, "highest")):
                    if move(settings, c, up) is None:
                        text += f"; {line} {getattr(c, line):g} is the {end} that could be tried"
            text += f"; in whole runs the learning rate is {self.chosen(side).rate:.3g} x the preset's"
            found.append(text)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "share_of_budget": SHARE,
            "seed": SEED,
            "rate_factor_for_whole_runs": self.for_whole_runs,
            "training_flops": sum(trial.flops for trial in self.trials),
            "chosen": {t.side.name: self.best(t.side).to_json() for t in self.trials},
            "trials": [trial.to_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Tuning":
        trials = tuple(Trial.from_json(trial) for trial in found["trials"])
        return cls(trials, found["text"], found["rate_factor_for_whole_runs"])


def text_to_choose_on(base: RunConfig) -> RunConfig:
    """The settings with a text whose validation part no whole run is scored on: the training file alone, of a folder
    with a training and a validation file. The last 5 % of it are then the validation part. Other sources stay as they
    are, and choices see the text that scores the whole runs."""
    if not (folder := Path(base.data.source)).is_dir():
        return base
    files = source_files(folder, base.data.format)
    source = str(files["train"][0]) if files["valid"] else base.data.source
    return dataclasses.replace(base, data=dataclasses.replace(base.data, source=source))


class _ShortRuns(NamedTuple):
    """What the short runs of all sides have in common."""

    base: RunConfig
    flops: float
    out: Path
    train: Train
    ratio: Ratio

    def steps(self, side: Side, candidate: Candidate, found: Tuning) -> int:
        """The rate changes no time. So a shape is measured once, and all its rates get the same steps."""
        settings = dense_baseline(self.base, side.dense)
        if side == MIXTURE:
            return max(1, math.floor(SHARE * self.flops / training_flops(candidate.apply(settings), 1)))
        mixture = found.best(MIXTURE)
        if side.basis == "tokens":
            return mixture.steps
        own, other = candidate._replace(rate=1.0), mixture.candidate._replace(rate=1.0)
        return max(1, round(mixture.steps / self.ratio(own.apply(settings), other.apply(self.base))))

    def trial(self, side: Side, found: Tuning, candidate: Candidate) -> Trial:
        """A run of the side with the settings of `candidate`. `found` has the mixture's trials."""
        steps, settings = self.steps(side, candidate, found), candidate.apply(dense_baseline(self.base, side.dense))
        name = f"tune-{DENSE_BASELINES[side.dense]}-{candidate.name}"
        config = run_config(settings, name, steps, SEED, self.out, evaluations=1)
        run = StudyRun(f"search, {side.name}, {candidate.name}", config)
        (summary,) = self.train([run])
        return Trial(side, candidate, steps, summary["training_flops"], summary[BITS])


def search(base: RunConfig, flops: float, out: Path, models: Sequence[Dense], train: Train, ratio: Ratio) -> Tuning:
    """Train the short runs of all sides for a budget of `flops` operations. Raises what `train` raises.

    `base` has the text to choose on. `ratio` says how many steps a side takes in the mixture's time.
    """
    runs, found = _ShortRuns(base, flops, out, train, ratio), Tuning((), base.data.source)
    for side in sides(models):
        settings, tried = dense_baseline(base, side.dense), partial(runs.trial, side, found)
        trials = [tried(Candidate.of(settings))]
        for move in LINES.values():
            start = min(trials, key=lambda trial: trial.bits)
            for up in (False, True):
                trials += _climb(start, partial(move, settings, up=up), tried)
        found = found._replace(trials=(*found.trials, *trials))
    return found


def _climb(
    best: Trial, move: Callable[[Candidate], Candidate | None], tried: Callable[[Candidate], Trial]
) -> list[Trial]:
    """The trials in one direction: until one is no better than the last, or the line ends."""
    trials = []
    while (candidate := move(best.candidate)) is not None:
        trials.append(tried(candidate))
        if trials[-1].bits >= best.bits:
            break
        best = trials[-1]
    return trials


def hidden_at_depth(side: RunConfig, layers: int) -> int | None:
    """`expert_hidden` with which a step at `layers` layers has as many operations as a step of `side`.

    The nearest whole number is taken. None if its operations differ by more than LARGEST_MISMATCH.
    """
    if layers < 1:
        return None
    aim = training_flops(side, 1)

    def flops(hidden: int) -> int:
        return training_flops(Candidate(1.0, layers, side.model.heads, hidden).apply(side), 1)

    widths = range(1, LARGEST_HIDDEN + 1)
    above = bisect.bisect_left(widths, aim, key=flops)
    near = min(widths[max(0, above - 1) : above + 1], key=lambda hidden: abs(flops(hidden) - aim))
    return near if abs(flops(near) - aim) <= LARGEST_MISMATCH * aim else None
