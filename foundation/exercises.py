"""The exercises of the notebooks: each checks an answer by code, and knows one right answer.

In a notebook:

    check("1.1", None)         prints the question
    check("1.1", answer)       says right, or what is wrong
    solution("1.1")            prints a right answer, for when you have tried

The first wrong answer gets a hint where to look. From the second on, if it is another one, the formula is told.
An answer may be anything: a wrong shape, a wrong type, a function that raises. It gets no traceback.
The questions are in `lessons/exercises.toml`, the answers in `lessons/solutions.py`.
"""

import difflib
import inspect
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import jax
import numpy as np

from foundation.challenges import diagnosis
from foundation.challenges.mistakes import made_on_purpose
from foundation.lessons.solutions import SOLUTIONS

TOLERANCE = 1e-4
"""Of a function's answer, relative to the largest entry: float32 will do."""
FOUR_DIGITS = 1e-3
"""Relative tolerance of a number that four digits meet."""

type Judge = Callable[[Any], str]
"""Looks at an answer. Empty where it is right, else what is wrong with it."""


@dataclass(frozen=True)
class Exercise:
    """One question. `judge` looks at an answer, `solution` is a right answer."""

    question: str
    judge: Judge
    solution: Any
    first_hint: str
    """What to look at."""
    hint: str
    """Nearly the answer, so it is told from the second wrong attempt on."""


_WRONG: dict[str, set[Any]] = {}
"""The different wrong answers to each exercise since Python started."""


def check(number: str, answer: Any) -> bool | None:
    """Says whether the answer is right; without an answer, prints the question, and returns None."""
    exercise = _find(number)
    if exercise is None or answer is None:
        if exercise is not None:
            print(f"Exercise {number}. {exercise.question}")
        return None
    wrong = exercise.judge(answer)
    if not wrong:
        print(f"{number}: right.")
        return True
    tried = _WRONG.setdefault(str(number), set())
    tried.add(_kind_of_try(answer))  # a cell that runs once more is no other try
    hint = exercise.hint if len(tried) > 1 else exercise.first_hint
    print(f"{number}: not yet. {wrong} Hint: {hint}")
    return False


def _kind_of_try(answer: Any) -> Any:
    """What tells an answer from another one: of a function its code, wherever it stands in a file."""
    code = getattr(answer, "__code__", None)
    try:
        return code.replace(co_firstlineno=1, co_linetable=b"") if isinstance(code, CodeType) else repr(answer)
    except Exception:  # the learner's own class
        return type(answer)


def solution(number: str) -> None:
    """Prints a right answer: a number, or the source of a function, below that of the functions that it calls."""
    exercise = _find(number)
    if exercise is not None:
        answer = exercise.solution
        print("\n\n\n".join(_sources(answer)) if isinstance(answer, FunctionType) else answer)


def _sources(function: FunctionType) -> list[str]:
    function = inspect.unwrap(function)  # the tests wrap each function to check shapes
    called = [function.__globals__.get(name) for name in function.__code__.co_names]
    own = [f for f in called if isinstance(f, FunctionType) and f.__module__ == function.__module__]
    source = inspect.getsource(function)
    if function.__name__ == "<lambda>":  # behind its key in the table of solutions
        source = source[source.index("lambda ") :]
    found = [source for f in own for source in _sources(f)] + [source.strip(" ,\n")]
    return list(dict.fromkeys(found))


def _find(number: object) -> Exercise | None:
    if str(number) not in EXERCISES:
        near = difflib.get_close_matches(str(number), EXERCISES, n=3, cutoff=0.3) or list(EXERCISES)[:3]
        print(f"{number}: no such exercise; near it: {', '.join(near)}")
    return EXERCISES.get(str(number))


def by_number(solution: float | Fraction, mistakes: Sequence[Sequence[str]] = ()) -> Judge:
    """Right where the answer is this number: exactly for an int or a fraction, else to four digits. `mistakes` are
    formulas of wrong numbers, and what they are."""
    tolerance = 1e-9 if isinstance(solution, int | Fraction) else FOUR_DIGITS
    expected = float(solution)
    known = [*((f": {text}", float(_formula(wrong)())) for wrong, text in mistakes), *_like(expected)]

    def judge(answer: Any) -> str:
        try:
            value = float(answer)
        except Exception:
            return f"A number is asked for, and this is {diagnosis.kind_of(answer)}."
        if math.isclose(value, expected, rel_tol=tolerance, abs_tol=1e-12):
            return ""
        near = next((text for text, wrong in known if math.isclose(value, wrong, rel_tol=FOUR_DIGITS)), "")
        if not near and tolerance == FOUR_DIGITS and math.isclose(value, expected, rel_tol=0.05):
            near = ". Give four digits, or an expression" if value == float(f"{value:.3g}") else ""
        return f"{value:.6g} is not the number{near}."

    return judge


def _like(expected: float) -> list[tuple[str, float]]:
    """Numbers that are written down for another one, and why."""
    share = [
        (": it is what is left, and the other part is asked for", 1.0 - expected),
        (": give a share, not per cent", 100.0 * expected),
    ]
    return [
        (", its negative is: look at the signs", -expected),
        (", one divided by it is", 1.0 / expected),
        (", half of it is", 2.0 * expected),
        (", twice it is", expected / 2.0),
        *(share if 0.1 < expected < 0.9 else []),
        (", its square root is", expected**2),
        (", its square is", math.sqrt(abs(expected))),
        (", one more is", expected - 1.0),
        (", one less is", expected + 1.0),
    ]


def by_function(
    expected: Callable[..., Any], shapes: Sequence[Sequence[int]], mistakes: Sequence[Sequence[str]] = ()
) -> Judge:
    """Right where the answer is a function that equals `expected` on random arrays of these shapes. `mistakes` are
    formulas of wrong answers, and what they are, beside those that are small changes of `expected`."""
    names = tuple(inspect.signature(expected).parameters)

    def judge(answer: Any) -> str:
        if not callable(answer):
            return f"A function is asked for, and this is {diagnosis.kind_of(answer)}."
        drawn = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
        return judged(answer, drawn) or judged(answer, [-array for array in drawn])  # a sign may be right by luck

    def judged(answer: Callable[..., Any], arrays: Sequence[jax.Array]) -> str:
        known = [diagnosis.Named(name, np.asarray(array)) for name, array in zip(names, arrays, strict=True)]
        likely = ((text, _formula(wrong, names)(*arrays)) for wrong, text in mistakes)
        made = partial(chain, likely, made_on_purpose(expected, tuple(arrays)))
        try:
            ours = answer(*arrays)
            found = diagnosis.judge(["result"], (ours,), (expected(*arrays),), known, made, TOLERANCE)
        except Exception as error:
            return f"Your function stops with {type(error).__name__}: {first_line(error)}."
        return f"{found.wrong}; {found.meaning}." if found.wrong else ""

    return judge


def _formula(text: str, names: Sequence[str] = ()) -> Callable[..., Any]:
    """A function of these letters, or of none."""
    return eval(f"lambda {', '.join(names)}: {text}", {**vars(math), **vars(jax.nn), "jnp": jax.numpy})


def first_line(error: BaseException, width: int = 140) -> str:
    """The first line of an error's message, cut to a width."""
    text = str(error).strip()
    line = text.splitlines()[0].rstrip(".") if text else "no message"
    return line if len(line) <= width else line[: width - 3] + "..."


def _exercise(number: str, shapes: Sequence[Any] = (), mistakes: Sequence[Any] = (), **texts: str) -> Exercise:
    solution = SOLUTIONS[number]
    judge = by_function(solution, shapes, mistakes) if callable(solution) else by_number(solution, mistakes)
    question, first_hint, hint = (" ".join(texts[name].split()) for name in ("question", "first_hint", "hint"))
    return Exercise(question, judge, solution, first_hint, hint)


_TEXTS = (Path(__file__).parent / "lessons" / "exercises.toml").read_text(encoding="utf-8")
EXERCISES = {number: _exercise(number, **texts) for number, texts in tomllib.loads(_TEXTS).items()}
