"""`benchmark.py scaling`: the exponents, and what is doubled."""

import dataclasses
import io

import pytest
from rich.console import Console

from moe_jax.benchmarks import scaling
from moe_jax.benchmarks.request import BenchmarkRequest
from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.system.machine import Times
from tests.support import tiny

BASE = RunConfig(
    model=tiny.config(layers=1, seq_len=32),
    train=TrainConfig(steps=10, batch_size=4),
    execution=ExecutionConfig(compute_dtype="float32"),
)


def test_exponents_of_known_powers() -> None:
    sizes = [3, 6, 12]
    assert scaling.exponent(sizes, [5, 5, 5]) == pytest.approx(0, abs=1e-12)
    assert scaling.exponent(sizes, [7 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    # Not on a line: (1, 1), (2, 2), (4, 16) have slopes 1 and 3, and least squares takes the one between the ends.
    assert scaling.exponent([1, 2, 4], [1, 2, 16]) == pytest.approx(2)


@pytest.mark.parametrize("axis", scaling.AXES, ids=lambda a: a.letter)
def test_each_axis_doubles_one_size(axis: scaling.Axis) -> None:
    grown = axis.grown(BASE, 2)
    assert axis.size(grown) == 2 * axis.size(BASE)
    tokens = [c.train.batch_size * c.model.seq_len for c in (BASE, grown)]
    assert tokens[1] == tokens[0] * (2 if axis.letter == "B" else 1)
    changed = "TB" if axis.letter == "T" else axis.letter
    others = [other for other in scaling.AXES if other.letter not in changed]
    assert [o.size(grown) for o in others] == [o.size(BASE) for o in others]


def test_growth_beside_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are doubled twice. Their slots are halved twice, without rounding, so only the router computes more.
    Muon's products double with the experts. Times that are given have the exponent given."""
    monkeypatch.setattr(scaling, "RandomTokenTrainer", StillTrainer)
    monkeypatch.setattr(scaling, "alternate", lambda runs, rounds: {n: Times((float(n) ** 0.5,)) for n in runs})
    monkeypatch.setattr(scaling, "_memory", lambda config, moe: config.model.experts**2)
    (experts,) = [axis for axis in scaling.AXES if axis.letter == "E"]
    found = scaling.points(BASE, experts, 3)
    assert [p.size for p in found] == [4, 8, 16]
    slopes = scaling.growth(found)
    assert slopes["time"] == pytest.approx(0.5)
    assert slopes["memory"] == pytest.approx(2)
    assert 0 < slopes["memory_bound"] < 1
    assert 0 <= slopes["time_bound"] < 0.2
    muon = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, optimizer="muon"))
    with_muon = scaling.growth(scaling.points(muon, experts, 3))
    assert with_muon["time_bound"] > slopes["time_bound"] + 0.1


class StillTrainer:
    """Makes no model."""

    @classmethod
    def of(cls, *_: object, **__: object) -> "StillTrainer":
        return cls()


def test_the_suite_measures_draws_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real step at two sizes; the batch of 1 leaves no longer sequence with as many tokens."""
    monkeypatch.setattr(scaling, "POINTS", 2)
    monkeypatch.setattr(scaling, "AXES", [a for a in scaling.AXES if a.letter in "TB"])
    printed = io.StringIO()
    request = BenchmarkRequest(BASE, 1, 1)
    numbers = scaling.scaling(Console(file=printed, width=100), request)
    assert list(numbers) == ["B"]
    assert "left out: T" in printed.getvalue()
    assert [p["size"] for p in numbers["B"]["points"]] == [1, 2]
    assert all(p["memory"] > p["least_memory"] > 0 for p in numbers["B"]["points"])
    assert numbers["B"]["time_bound"] == pytest.approx(1)
    pytest.importorskip("matplotlib")
    figure = scaling.scaling_figure("nano", numbers)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "B: sequences of a step"
