"""When a certificate passes, worked by hand. No model is compiled."""

from typing import Any

import numpy as np
import pytest

from moe_jax.certify import arithmetic, causality
from moe_jax.certify.causality import PerturbationResult, count_changes
from moe_jax.certify.hlo import Dot, Program

# Causality


@pytest.mark.parametrize(
    ("earlier", "other_row", "later", "causal"),
    [(0, 0, 5, True), (1, 0, 5, False), (0, 1, 5, False), (0, 0, 0, False)],
)
def test_what_is_causal(earlier: int, other_row: int, later: int, causal: bool) -> None:
    found = PerturbationResult(8, 8, earlier, other_row, later, 0.5)
    assert found.causal == causal
    assert str(found) == (
        f"one token changed at each of 8 positions: {earlier} earlier outputs changed, and "
        f"{other_row} of the sequence that was left alone; 50% of the choices dropped"
    )
    assert " at 6 of 8 positions:" in str(found._replace(positions=6))


BEFORE, OTHER = np.arange(24).reshape(3, 8), 100 + np.arange(24).reshape(3, 8)


@pytest.mark.parametrize(
    ("outputs", "earlier", "other_row", "later"),
    [
        (lambda x: x, 0, 0, 2 * 8),  # 8 positions, each in two of three rows: each changes its own output
        (lambda x: np.cumsum(x, 1), 0, 0, 2 * (8 + 7 + 6 + 5 + 4 + 3 + 2 + 1)),
        (lambda x: np.cumsum(x[:, ::-1], 1)[:, ::-1], 2 * (0 + 1 + 2 + 3 + 4 + 5 + 6 + 7), 0, 2 * 8),
        (lambda x: x.sum(0, keepdims=True) + 0 * x, 0, 8, 2 * 8),
        (lambda x: 0 * x, 0, 0, 0),
    ],
    ids=["own", "later", "earlier", "other row", "nothing"],
)
def test_changes_are_counted_by_where_they_are(outputs: Any, earlier: int, other_row: int, later: int) -> None:
    def run(x: Any) -> Any:
        return outputs(x)[..., None], np.array([0.25, 0.75, 0.5])

    assert count_changes(run, BEFORE, OTHER) == (8, 8, earlier, other_row, later, 0.75)


def test_every_position_is_changed_in_all_rows_but_one() -> None:
    """To the token before or to another one. Every row is left alone at some positions, and changed at others."""
    rng = np.random.default_rng(5)
    before, other = rng.integers(0, 50, (4, 64)), rng.integers(50, 100, (4, 64))
    calls: list[np.ndarray] = []

    def run(x: Any) -> Any:
        calls.append(x.copy())
        return x, np.zeros(1)

    count_changes(run, before, other)
    changed = np.stack([call != before for call in calls[1:]])  # [call, row, position]
    assert (calls[0] == before).all()
    assert len(calls) == 1 + 64
    for t, call in enumerate(changed):
        assert not np.delete(call, t, axis=1).any()
        assert call[:, t].sum() == 3
    assert (changed.any(2).sum(0) > 32).all()
    assert (changed.any(2).sum(0) < 64).all()
    new = np.array([[calls[1 + t][row, t] for t in range(64)] for row in range(4)])
    copies = (new[:, 1:] == before[:, :-1])[changed[1:, :, :].any(2).T]
    assert 0.35 < copies.mean() < 0.65
    assert ((new == before) | (new == other) | (new == np.roll(before, 1, axis=1))).all()


@pytest.mark.parametrize(("slots", "dropped", "passed"), [(4, 0.1, True), (4, 0.0, False), (None, 0.0, True)], ids=str)
def test_a_capacity_must_be_tested_under_drops(
    slots: int | None, dropped: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causality, "count_changes", lambda *_: PerturbationResult(8, 8, 0, 0, 5, dropped))
    certificate = causality.perturbed("causality: a layer", max, BEFORE, OTHER, 1, slots)
    assert certificate.passed == passed
    assert ("while choices are dropped" in certificate.asked) == (slots is not None)


# Arithmetic


def dot(flops: int, op_name: str = "", operands: str = "f32", precision: str = "highest") -> Dot:
    return Dot(op_name, operands, precision, flops, 1)


@pytest.mark.parametrize(
    ("dots", "passed"),
    [
        ([dot(60, "a/router/b"), dot(40, "a/router/b", "f64"), dot(7, "a/head/b", "bf16", "default")], True),
        ([dot(60, "a/router/b"), dot(39, "a/router/b")], False),
        ([dot(60, "a/router/b"), dot(40, "a/router/b", precision="default")], False),
        ([dot(60, "a/router/b"), dot(40, "a/router/b", "bf16", "highest")], False),
        ([dot(60, "a/router/b"), dot(40, "a/router/b", "f32 x bf16", "highest")], False),
    ],
    ids=["wide", "one missing", "TF32", "bfloat16", "mixed"],
)
def test_the_precision_of_the_router(dots: list[Dot], passed: bool) -> None:
    assert arithmetic.router_precision(Program(dots), 100).passed == passed


# Which certificates a model gets
