"""The fit of a power law: a made law comes back exactly, and the interval agrees with scipy and with a simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from moe_jax.experiments.intervals import CONFIDENCE
from moe_jax.experiments.power_law import PowerLaw, fit

BUDGETS = [2e12 * 10 ** (i / 2) for i in range(5)]
NOISE = np.random.default_rng(0).normal(size=5) * 0.01
NOISY = [3.0 * c**-0.05 * math.exp(e) for c, e in zip(BUDGETS, NOISE, strict=True)]


def test_a_made_law_comes_back() -> None:
    """L = 5 C^-0.07 without noise: a, b and every prediction are exact, and the interval has no width."""
    law = fit(BUDGETS, [5 * c**-0.07 for c in BUDGETS])
    assert law.exponent == pytest.approx(0.07, rel=1e-12)
    assert law.factor == pytest.approx(5, rel=1e-10)
    assert law.exponent_error < 1e-14
    for flops in (1e11, 3e13, 1e16):
        interval = law.prediction(flops)
        assert interval.mean == pytest.approx(5 * flops**-0.07, rel=1e-12)
        assert interval.high - interval.low < 1e-12


def test_the_slope_and_its_error_are_those_of_scipy() -> None:
    law, line = fit(BUDGETS, NOISY), stats.linregress(np.log(BUDGETS), np.log(NOISY))
    assert law.exponent == pytest.approx(-line.slope, rel=1e-9)
    assert law.exponent_error == pytest.approx(line.stderr, rel=1e-9)
    assert law.factor == pytest.approx(math.exp(line.intercept), rel=1e-9)


def test_the_interval_is_that_of_the_regression_with_an_intercept() -> None:
    """The variance of a new log L at x is s^2 (1 + (1, x) (X^T X)^-1 (1, x)^T), with s^2 from n - 2 degrees."""
    law, design = fit(BUDGETS, NOISY), np.stack([np.ones(5), np.log(BUDGETS)], 1)
    beta, (rest,), *_ = np.linalg.lstsq(design, np.log(NOISY), rcond=None)
    for flops in (2e12, 1e13, 1e16):
        row = np.array([1, math.log(flops)])
        variance = rest / 3 * (1 + row @ np.linalg.inv(design.T @ design) @ row)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, 3) * math.sqrt(variance)
        interval = law.prediction(flops)
        assert math.log(interval.high) == pytest.approx(row @ beta + half, abs=1e-7)
        assert math.log(interval.low) == pytest.approx(row @ beta - half, abs=1e-7)


def test_the_interval_holds_a_new_point_as_often_as_it_says() -> None:
    """Of 4,000 made laws with noise, 95 % of new noisy points at fifty times the largest budget, within 1.4 points:
    four standard deviations of that count. Without the term of the distance it would be 82 %."""
    random, hits = np.random.default_rng(1), 0
    for _ in range(4000):
        losses = [2 * c**-0.1 * math.exp(e) for c, e in zip(BUDGETS, 0.02 * random.normal(size=5), strict=True)]
        interval = fit(BUDGETS, losses).prediction(1e16)
        hits += interval.low <= 2 * 1e16**-0.1 * math.exp(0.02 * random.normal()) <= interval.high
    assert abs(hits / 4000 - CONFIDENCE) < 0.014


def test_two_points_have_a_line_and_no_interval() -> None:
    """L halves while C grows fourfold: b = 1/2."""
    law = fit([1.0, 4.0], [2.0, 1.0])
    assert law.exponent == pytest.approx(0.5)
    assert law.loss(16.0) == pytest.approx(0.5)
    assert not law.prediction(16.0).known
    assert law.to_json()["b_standard_error"] is None
    assert law.to_json()["scatter_of_log_loss"] is None


def test_one_budget_is_no_law() -> None:
    with pytest.raises(ValueError, match="2 points at one budget"):
        fit([4.0, 4.0], [1.0, 2.0])


def test_the_record_of_a_law() -> None:
    """log C = 0, 1, 2 and log L = 0, 1, 0: slope 0, left over -1/3, 2/3, -1/3, so s^2 = 2/3 with one degree."""
    law = fit([1.0, math.e, math.e**2], [1.0, math.e, 1.0])
    assert law == pytest.approx(PowerLaw(math.e, math.exp(1 / 3), 0.0, math.sqrt(2 / 3), 3, 2.0))
    found = law.to_json()
    assert found["a"] == pytest.approx(math.exp(1 / 3))
    assert found["b_standard_error"] == pytest.approx(math.sqrt(1 / 3))
    assert (found["points"], found["b"]) == (3, pytest.approx(0))
