"""The exercises of the notebooks: each checks an answer by code, and knows one right answer.

In a notebook:

    ask("1.1")                 prints the question
    check("1.1", answer)       says right, or what is wrong; None means "not tried yet"
    solution("1.1")            a right answer, for when you have tried: a number, or the source of a function

The first wrong answer gets a hint where to look. From the second on the formula is told.
An answer may be anything: a wrong shape, a wrong type, a function that raises. It gets no traceback.
The questions are in `lessons/questions.py`.
"""

import difflib
import inspect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import jax
import numpy as np

TOLERANCE = 1e-4
"""Of a function's answer, relative to the largest entry: float32 will do."""
FOUR_DIGITS = 1e-3
"""Relative tolerance of a number that four digits meet."""

type Judge = Callable[[Any], str]
"""Looks at an answer. Empty where it is right, else what is wrong with it."""


@dataclass(frozen=True)
class Exercise:
    """One question; `judge` looks at an answer, `solution` is a right answer. `first_hint` says what to look at. `hint`
    is nearly the answer, so it is told from the second wrong attempt on."""

    question: str
    judge: Judge
    hint: str
    solution: Any
    first_hint: str


_WRONG: Counter[str] = Counter()
"""Wrong attempts at each exercise since Python started."""


def ask(number: str) -> None:
    """Prints the question."""
    if exercise := _find(number):
        print(f"Exercise {number}. {exercise.question}")


def check(number: str, answer: Any) -> bool | None:
    """Says whether the answer is right; None, the state before a try, is neither right nor wrong."""
    exercise = _find(number)
    if exercise is None or answer is None:
        if exercise is not None:
            print(f"{number}: not tried yet.")
        return None
    wrong = exercise.judge(answer)
    if not wrong:
        print(f"{number}: right.")
        return True
    _WRONG[str(number)] += 1
    hint = exercise.hint if _WRONG[str(number)] > 1 else exercise.first_hint
    print(f"{number}: not yet. {wrong} Hint: {hint}")
    return False


def solution(number: str) -> Any:
    """A right answer; a function comes as `Shown`. None, and a line with the near numbers, where there is no such
    exercise."""
    exercise = _find(number)
    if exercise is None:
        return None
    return Shown(exercise.solution) if isinstance(exercise.solution, FunctionType) else exercise.solution


class Shown:
    """A function that a notebook displays as its source. It can be called as the function."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def __call__(self, *arrays: Any) -> Any:
        """The function's answer."""
        return self.function(*arrays)

    def __repr__(self) -> str:
        """The source, below that of the functions of its own file that it calls."""
        return "\n\n".join(_sources(self.function)).rstrip()


def _sources(function: FunctionType) -> list[str]:
    function = inspect.unwrap(function)  # the tests wrap each function to check shapes
    called = [function.__globals__.get(name) for name in function.__code__.co_names]
    own = [f for f in called if isinstance(f, FunctionType) and f.__module__ == function.__module__]
    found = [source for f in own for source in _sources(f)] + [inspect.getsource(function)]
    return list(dict.fromkeys(found))


def _find(number: object) -> Exercise | None:
    from foundation.lessons.questions import EXERCISES  # which imports the judges from here

    if str(number) not in EXERCISES:
        near = difflib.get_close_matches(str(number), EXERCISES, n=3, cutoff=0.3) or list(EXERCISES)[:3]
        print(f"{number}: no such exercise; near it: {', '.join(near)}")
    return EXERCISES.get(str(number))


def number(expected: float, tolerance: float = FOUR_DIGITS) -> Judge:
    """Right where the answer is this number, to a relative tolerance. An answer within 5 % is asked for more digits."""

    def judge(answer: Any) -> str:
        try:
            value = float(answer)
        except Exception:
            return f"A number is asked for, and this is {_kind(answer)}."
        if math.isclose(value, expected, rel_tol=tolerance, abs_tol=1e-12):
            return ""
        rounded = tolerance == FOUR_DIGITS and math.isclose(value, expected, rel_tol=0.05)
        return f"{value:.6g} is not the number." + (" Give four digits, or an expression." if rounded else "")

    return judge


def function(expected: Callable[..., Any], *shapes: tuple[int, ...]) -> Judge:
    """Right where the answer is a function that equals `expected` on random arrays of these shapes."""

    def judge(answer: Any) -> str:
        if not callable(answer):
            return f"A function is asked for, and this is {_kind(answer)}."
        arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
        right = np.asarray(expected(*arrays))
        try:
            ours = np.asarray(answer(*arrays))
        except Exception as error:
            return f"Your function stops with {type(error).__name__}: {first_line(error)}."
        if ours.dtype.kind not in "fiub":
            return f"Your function gives {_kind(ours)}, and an array of numbers is asked for."
        if ours.shape != right.shape:
            return f"Your function gives shape {list(ours.shape)}, and {list(right.shape)} is asked for."
        error = np.max(np.abs(ours - right)) / np.max(np.abs(right))
        return "" if error < TOLERANCE else f"The largest entry that is off is off by {100 * error:.3g} %."

    return judge


def first_line(error: BaseException, width: int = 140) -> str:
    """The first line of an error's message, cut to a width."""
    text = str(error).strip()
    line = text.splitlines()[0].rstrip(".") if text else "no message"
    return line if len(line) <= width else line[: width - 3] + "..."


def _kind(answer: Any) -> str:
    """What an answer is, in words."""
    if isinstance(answer, np.ndarray | jax.Array):
        return f"an array of {answer.dtype} with shape {list(answer.shape)}"
    name = type(answer).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
