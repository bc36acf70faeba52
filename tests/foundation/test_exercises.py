"""Every exercise takes its solution and no other answer, and answers anything at all with its hint."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from foundation import exercises
from foundation.lessons.questions import EXERCISES


@pytest.mark.parametrize("number", EXERCISES)
def test_exercise_takes_its_solution_and_no_other(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    right = exercises.solution(number)
    assert exercises.check(number, right) is True
    wrong = (lambda *arrays: 1.01 * right(*arrays)) if callable(right) else right * 1.5 + 0.7
    assert exercises.check(number, wrong) is False
    assert exercises.check(number, None) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("right.")
    assert "Hint" in said[1]
    assert said[2].endswith("not tried yet.")


def complains(*_: object) -> None:
    raise RuntimeError("first\nsecond")


@pytest.mark.parametrize("number", EXERCISES)
def test_any_answer_of_any_type_gets_the_hint(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    junk = ["seven", [1, 2], np.zeros((3, 9)), jnp.zeros(()), 1j, object(), math.nan, lambda: 0, complains,
            lambda *a: None, lambda *a: "text", lambda *a: np.zeros((7, 7)), lambda *a: a[0] * math.nan,
            lambda *a: a, lambda *a: 1j * a[0], {"a": 1}]  # fmt: skip
    for answer in junk:
        assert exercises.check(number, answer) is False
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(junk)
    for line in said:
        assert line.startswith(f"{number}: not yet. ")
        assert line.endswith("Hint: " + EXERCISES[number].hint)


@pytest.mark.parametrize(
    ("number", "answer"), [("2.1", lambda x, d_y: d_y @ x), ("5.1", lambda d_scores, q: d_scores @ q)]
)
def test_the_likeliest_mistake_gets_the_hint(number: str, answer: object, capsys: pytest.CaptureFixture[str]) -> None:
    """A product whose shapes do not fit stops with a TypeError of jax."""
    assert exercises.check(number, answer) is False
    said = capsys.readouterr().out
    assert "TypeError" in said
    assert "Hint" in said


def test_an_unknown_number_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    exercises.ask("7.11")
    assert exercises.check("7.11", 1.0) is None
    assert exercises.solution("7.11") is None
    assert [
        line.startswith("7.11: no such exercise; near it: 7.1") for line in capsys.readouterr().out.splitlines()
    ] == [True] * 3


def test_a_number_is_judged_relatively() -> None:
    judge = exercises.number(2.0**-20)
    assert not judge(2.0**-20)
    assert judge(2.0**-19)
    assert judge(0.0)
    assert judge(math.nan)
