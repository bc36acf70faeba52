"""The catalogue of checks passes, and the check itself can fail."""

import itertools
from collections.abc import Iterable

import jax.numpy as jnp
import pytest

from foundation import checks, parity, table
from foundation.__main__ import main
from foundation.chapters import CHAPTERS, OPERATIONS, selected
from foundation.parity import Check, OracleCheck, Outcome

LONG = {
    "accumulated_loss": 1,
    "attention": 2,
    "block": 1,
    "decode": 1,
    "dense_block": 1,
    "dense_model": 1,
    "flash_attention": 1,
    "kept_choices": 4,
    "leaks": 1,
    "model": 1,
    "moe": 2,
    "multi_head": 2,
    "router": 2,
    "upcycled_gradient": 1,
}
"""Operations whose checks take seconds to compile, and how many of them a run of the tests makes. At night: all."""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_by_hand_equals_autodiff_and_finite_differences(operation: str) -> None:
    """Also at an input whose right numbers are not all 0: there a wrong factor would pass."""
    zeros = compare(itertools.islice(checks.checks_of(operation), LONG.get(operation)))
    assert operation in LONG or not all(zeros)


@pytest.mark.slow
@pytest.mark.parametrize("operation", LONG)
def test_the_other_checks_of_a_long_operation(operation: str) -> None:
    compare(itertools.islice(checks.checks_of(operation), LONG[operation], None))


def compare(chosen: Iterable[parity.AnyCheck]) -> list[bool]:
    """For each check, whether it compares zeros only."""
    outcomes = list(map(parity.run, chosen))
    assert [outcome for outcome in outcomes if not outcome.passed] == []
    return [outcome.zeros for outcome in outcomes]


def test_the_catalogue_is_whole() -> None:
    catalogue = list(checks.all_checks())
    names = [check.name for check in catalogue]
    assert len(names) >= 160
    assert len(set(names)) == len(names)
    assert {check.operation for check in catalogue} == set(OPERATIONS)
    assert (
        sum(getattr(check, "at_tie", False) for check in catalogue) <= 3
    )  # only ties are excused from finite differences


def square(scale: float, d_scale: float) -> Check:
    x = jnp.array([1.0, 2.0, -3.0])
    return Check("square", "test", lambda x: (scale * x**2, x), lambda d, x: 2.0 * d_scale * d * x, (x,))


def test_a_gradient_that_is_off_by_a_millionth_fails_both_ways() -> None:
    right, wrong = parity.run(square(1.0, 1.0)), parity.run(square(1.0, 1.0 + 2e-6))
    assert right.passed
    assert not wrong.passed
    assert wrong.autodiff == pytest.approx(2e-6, rel=1e-3)
    assert wrong.finite_difference == pytest.approx(2e-6, rel=1e-3)


def test_an_answer_that_is_off_fails_against_its_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    def check(factor: float) -> OracleCheck:
        return OracleCheck("power", "test", lambda x, n: factor * x**n, lambda x, n: x * x, (jnp.arange(4.0),), (2,))

    assert parity.run(check(1.0)) == Outcome("power: test", None, None, 0.0)
    off = parity.run(check(1.0 + 1e-9))
    assert not off.passed
    assert table.row(off).endswith("1.0e-09 FAILED")


def test_nan_fails() -> None:
    assert not parity.run(square(1.0, float("nan"))).passed
    assert not Outcome("x: y", 0.0, float("nan")).passed


def test_a_gradient_of_another_shape_is_refused() -> None:
    check = Check("sum", "test", lambda x: (jnp.sum(x), None), lambda d, _: d, (jnp.ones(3),))
    with pytest.raises(ValueError, match="against"):
        parity.run(check)


def test_an_input_near_a_kink_is_refused() -> None:
    check = Check("id", "test", lambda x: (x, None), lambda d, _: d, (jnp.ones(3),), margin=1e-3)
    with pytest.raises(ValueError, match="kink"):
        parity.run(check)


def test_relative_error_floors_a_leaf_that_is_zero_in_exact_arithmetic() -> None:
    big, noise = jnp.array([2.0]), jnp.array([1e-16])
    assert parity.max_relative_error((big, noise), (big, -noise)) == pytest.approx(2e-16 / (1e-5 * 2.0))
    assert parity.max_relative_error((big, 0.0 * noise), (big, 0.0 * noise)) == 0.0


def test_the_table_reports_and_exits_by_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*checks: parity.Check) -> tuple[int, str]:
        monkeypatch.setattr(table, "all_checks", lambda: checks)
        return main([]), capsys.readouterr().out

    status, out = said(square(1.0, 1.0))
    assert (status, "1 checks, 0 failed" in out, "against autodiff" in out) == (0, True, True)
    assert "an oracle" not in out  # no check of this selection has one
    status, out = said(square(1.0, 1.0), square(1.0, 2.0))
    assert (status, "2 checks, 1 failed" in out, out.count(" FAILED")) == (1, True, 1)
    status, out = said(square(1.0, 1.0), square(0.0, 0.0))
    assert status == 0
    assert "1 would fail with a wrong factor; the right numbers of 1 are all 0" in out


def test_a_selection_is_by_operation_or_by_chapter() -> None:
    assert selected(["softmax", "linear", "softmax"]) == ("softmax", "linear")
    assert selected(["4"]) == selected(["04"]) == selected(["04_softmax_and_cross_entropy.ipynb"])
    assert selected([]) == ()
    assert len({chapter.number for chapter in CHAPTERS}) == len(CHAPTERS) == 22


@pytest.mark.parametrize(
    ("name", "near"),
    [("atention", "attention"), ("layer-norm", "layernorm"), ("multihead", "multi_head"), ("norm", "rmsnorm"),
     ("05_atention", "05_attention"), ("zzzzzz", "give an operation"), ("1", "chapter without rows"), ("99", "9")],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_the_near_ones(
    name: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert near in said.err
