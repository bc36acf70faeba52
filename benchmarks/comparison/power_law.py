"""A power law L = a C^-b of the loss L in the training operations C, fitted by least squares in log L and log C.

The law has no floor: it falls to 0 as C grows. A loss with a floor bends upwards from it, so far beyond the fitted
budgets the law predicts too low a loss.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from comparison.report import CONFIDENCE, Interval


class PowerLaw(NamedTuple):
    """The fitted line log L = log L_m - b (log C - log C_m), where C_m and L_m are geometric means of the points."""

    middle_flops: float
    middle_loss: float
    exponent: float
    """b."""
    scatter: float
    """Standard deviation of log L around the line, with n - 2 degrees of freedom. NaN for two points."""
    points: int
    """n."""
    spread: float
    """Sum of the squares of log C - log C_m."""

    @property
    def factor(self) -> float:
        """a. A number so far outside the points that only its product with C^-b has a meaning."""
        return self.middle_loss * self.middle_flops**self.exponent

    @property
    def exponent_error(self) -> float:
        """Standard error of b: scatter / sqrt(spread)."""
        return self.scatter / math.sqrt(self.spread)

    def loss(self, flops: float) -> float:
        """The loss of the line at a budget."""
        return self.middle_loss * (flops / self.middle_flops) ** -self.exponent

    def prediction(self, flops: float) -> Interval:
        """The loss at a budget, with the prediction interval of one further point of the same kind.

        In log L its half width is t(n - 2) scatter sqrt(1 + 1/n + (log C - log C_m)^2 / spread).
        """
        mean = self.loss(flops)
        if not math.isfinite(self.scatter):
            return Interval(mean, math.nan, math.nan)
        away = math.log(flops / self.middle_flops)
        quantile = float(stdtrit(self.points - 2, (1 + CONFIDENCE) / 2))
        half = quantile * self.scatter * math.sqrt(1 + 1 / self.points + away**2 / self.spread)
        return Interval(mean, mean * math.exp(-half), mean * math.exp(half))

    def to_json(self) -> dict[str, Any]:
        known = math.isfinite(self.scatter)
        return {
            "form": "L = a C^-b, by least squares of log L in log C, over the means of the seeds at each budget",
            "a": self.factor,
            "b": self.exponent,
            "b_standard_error": self.exponent_error if known else None,
            "scatter_of_log_loss": self.scatter if known else None,
            "points": self.points,
        }


def fit(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The power law nearest to the points, which are at two or more different budgets.

    Raises ValueError for fewer than two budgets.
    """
    x, y = np.log(np.asarray(flops, np.float64)), np.log(np.asarray(losses, np.float64))
    away = x - x.mean()
    spread = float(away @ away)
    if spread == 0:
        raise ValueError(f"{len(x)} points at one budget: a power law needs two budgets or more")
    slope = float(away @ y) / spread
    left = y - y.mean() - slope * away
    scatter = math.sqrt(float(left @ left) / (len(x) - 2)) if len(x) > 2 else math.nan
    return PowerLaw(math.exp(x.mean()), math.exp(y.mean()), -slope, scatter, len(x), spread)
