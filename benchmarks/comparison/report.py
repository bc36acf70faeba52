"""Means over seeds with confidence intervals, and the result of a comparison: table, sentences, record, pictures."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
IN_BRACKETS = " [95 %]"
"""Ends the heading of a column of means, whose intervals stand in brackets."""


class Interval(NamedTuple):
    """A mean and its confidence interval. The ends are NaN for a single value."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.low)

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": [self.low, self.high] if self.known else None}

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" [{self.low:.4f}, {self.high:.4f}]" if self.known else "")


def paired(baseline: Sequence[float], ours: Sequence[float]) -> Interval:
    """Student's interval for the mean of baseline - ours. Scores of the same seed stand at the same place in both."""
    return t_interval([theirs - own for theirs, own in zip(baseline, ours, strict=True)])


def t_interval(values: Sequence[float]) -> Interval:
    """Student's interval for the mean of normally distributed values: mean ± t(n - 1) s / sqrt(n)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def apart(a: Interval, b: Interval) -> bool | None:
    """Whether two intervals do not overlap; None if one of them is unknown."""
    return (a.high < b.low or b.high < a.low) if a.known and b.known else None


def difference_in_words(difference: Interval, baseline: str) -> str:
    """The mean of `paired` in words: which of the two is better, by how much, and whether the seeds can tell."""
    side = "better" if difference.mean > 0 else "worse"
    text = f"{side} than {baseline} by {abs(difference.mean):.4f} bits per byte"
    if not difference.known:
        return f"{text}; one seed gives no interval"
    if difference.low <= 0 <= difference.high:
        return f"{text}, less than the seeds can tell: 95 % [{difference.low:+.4f}, {difference.high:+.4f}]"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return f"{text}, 95 % [{low:.4f}, {high:.4f}] paired by seed"


Figures = Callable[[], dict[str, Any]]
"""Draws pictures, by name. Raises UserError where matplotlib is missing."""


class Report(NamedTuple):
    """A result of `moe-jax compare`."""

    name: str
    """Name of the files, without their ending."""
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    """One row of cells for each model or budget. An empty cell has no number."""
    sentences: list[str]
    record: dict[str, Any]
    """All numbers, as JSON can hold them."""
    scores: dict[str, list[float]]
    """Bits per byte of each seed, by the name of the model. The intervals can be computed from them."""
    figures: Figures

    @property
    def seeds(self) -> int:
        return len(next(iter(self.scores.values())))

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings. One seed gives no intervals, so then no heading names them."""
        return self.headings if self.seeds > 1 else tuple(name.removesuffix(IN_BRACKETS) for name in self.headings)

    def to_markdown(self) -> str:
        """The table, the sentences and the scores of the seeds."""
        sentences = "".join(f"- {sentence}\n" for sentence in self.sentences)
        headings = ("bits per byte", *(f"seed {seed}" for seed in range(self.seeds)))
        scores = [(name, *(f"{score:.4f}" for score in own)) for name, own in self.scores.items()]
        return f"{table(self.columns, self.rows)}\n{sentences}\n{table(headings, scores)}"


def table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
