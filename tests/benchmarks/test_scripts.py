"""`benchmarks/doubling.py`, `weights.py` and `pipeline.py`: what they count, by hand, and the first on a tiny model."""

import io

import doubling
import pytest
import weights
from rich.console import Console

from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from tests.benchmarks.test_suites import config
from tests.support import tiny

BASE = RunConfig(
    model=tiny.config(layers=1, seq_len=32),
    train=TrainConfig(steps=10, batch_size=4),
    execution=ExecutionConfig(compute_dtype="float32"),
)


def test_exponents_of_known_powers() -> None:
    sizes = [3, 6, 12]
    assert doubling.exponent(sizes, [5, 5, 5]) == pytest.approx(0, abs=1e-12)
    assert doubling.exponent(sizes, [7 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    # Not on a line: (1, 1), (2, 2), (4, 16) have slopes 1 and 3, and least squares takes the one between the ends.
    assert doubling.exponent([1, 2, 4], [1, 2, 16]) == pytest.approx(2)


@pytest.mark.parametrize("axis", doubling.AXES, ids=lambda a: a.letter)
def test_each_axis_doubles_one_size(axis: doubling.Axis) -> None:
    grown = axis.grown(BASE, 2)
    assert axis.size(grown) == 2 * axis.size(BASE)
    tokens = [c.train.batch_size * c.model.seq_len for c in (BASE, grown)]
    assert tokens[1] == tokens[0] * (2 if axis.letter == "B" else 1)
    changed = "TB" if axis.letter == "T" else axis.letter
    others = [other for other in doubling.AXES if other.letter not in changed]
    assert [o.size(grown) for o in others] == [o.size(BASE) for o in others]


@pytest.mark.slow
def test_the_suite_measures_draws_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real step at two sizes; the batch of 1 leaves no longer sequence with as many tokens."""
    monkeypatch.setattr(doubling, "POINTS", 2)
    monkeypatch.setattr(doubling, "AXES", [a for a in doubling.AXES if a.letter in "TB"])
    printed = io.StringIO()
    numbers = doubling.every_axis(Console(file=printed, width=100), BASE, 1, 1)
    assert list(numbers) == ["B"]
    assert "left out: T" in printed.getvalue()
    assert [p["size"] for p in numbers["B"]["points"]] == [1, 2]
    assert all(p["memory"] > p["least_memory"] > 0 for p in numbers["B"]["points"])
    assert numbers["B"]["time_bound"] == pytest.approx(1)
    pytest.importorskip("matplotlib")
    figure = doubling.scaling_figure("nano", numbers)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "B: sequences of a step"


@pytest.mark.slow
def test_bytes_of_a_token_by_hand() -> None:
    """Width 16, two layers, 4 experts of 24 hidden units (swiglu), 2 chosen, a tied vocabulary of 60.

    float32, entries: embedding 960; a layer has attention 16 x 48 + 16 x 16 = 1,024, two of four experts
    2 x 3 x 384 = 2,304, and the router 64; five norms of 16. int8: a byte an entry, and four a scale: 60 for the
    embedding, 48 + 16 for attention, 2 x (24 + 24 + 16) for the experts. int4: half a byte an entry, and two bytes for
    a scale of 16 inputs, or of 8 in w_out: 24 = 3 x 8.
    """
    model = config().model
    _, params = tiny.build(model)
    rest = 4 * (2 * 64 + 5 * 16)
    entries = 960 + 2 * (1024 + 2304)
    scales = 60 + 2 * (64 + 2 * (24 + 24 + 16))
    groups = 60 + 2 * (64 + 2 * (24 + 24 + 3 * 16))
    found = {form: weights.bytes_per_token(model, weights.in_form(params, form)) for form in weights.FORMS}
    assert found == {
        "float32": 4 * entries + rest,
        "bfloat16": 2 * entries + rest - 2 * 2 * 64,  # the routers are matrices, too
        "int8": entries + 4 * scales + rest,
        "int4": entries // 2 + 2 * groups + rest,
    }
