"""Runs the real cases against your derivation.

OPERATION is a name, or the path of the file that `derive` wrote. Prints the
first wrong entry, its index, the ratio, and what such a ratio usually means.
Exits 1 until the derivation is right.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foundation.challenges.catalogue import CHALLENGES, Challenge, Unusable
from foundation.challenges.derive import find, parser_of
from foundation.challenges.folder import read_score, write_score
from foundation.chapters import CHAPTERS


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where it is right, 1 where it is not, 2 for an unknown operation, 130 after Ctrl-C."""
    parser = parser_of("check", __doc__)
    parser.add_argument("operation", help="as layernorm, or derivations/layernorm.py")
    parser.add_argument("--hint", action="store_true", help="the next hint")
    arguments = parser.parse_args(argv)
    given = Path(arguments.operation)
    path, operation = (given, given.stem) if given.suffix == ".py" else (None, arguments.operation)
    challenge = find(operation)
    if challenge is None:
        return 2
    folder = path.parent if path else arguments.folder
    if arguments.hint:
        return _next_hint(operation, challenge, folder)
    print(f"checking {operation} ...", flush=True)  # jax takes seconds to load
    try:
        right = _judge(operation, challenge, load(path or folder / f"{operation}.py", operation, challenge.backward))
    except Unusable as problem:
        print(problem)
        if isinstance(problem.__cause__, KeyboardInterrupt):
            return 130
        right = False
    if right:
        score = read_score(folder)
        score["derived"] = [*dict.fromkeys([*map(str, score["derived"]), operation])]
        write_score(folder, score)
        print(f"\n{operation}: right in every case. {_derived(score['derived'])}")
        return 0
    if _shown(read_score(folder), operation) < len(challenge.hints):
        print(f"\nThe next hint: uv run python -m foundation check {arguments.operation} --hint")
    else:
        chapter = next(chapter for chapter in CHAPTERS if operation in chapter.operations)
        where = f"in chapter {chapter.number}: foundation/notebooks/{chapter.stem}.ipynb"
        print(f"\nAll hints are given. The derivation is {where}")
    return 1


def _derived(done: list[str]) -> str:
    """How many operations are derived, and one to go on with."""
    left = [name for chapter in CHAPTERS for name in chapter.operations if name in CHALLENGES and name not in done]
    so_far = f"Derived so far: {len(CHALLENGES) - len(left)} of {len(CHALLENGES)}."
    return so_far + (f"\nThe next one: uv run python -m foundation derive {left[0]}" if left else "")


def _shown(score: dict[str, Any], operation: str) -> int:
    """How many hints were given for an operation."""
    shown = score["hints"].get(operation, 0)
    return shown if isinstance(shown, int) and shown >= 0 else 0


def _next_hint(operation: str, challenge: Challenge, folder: Path) -> int:
    score = read_score(folder)
    shown = min(_shown(score, operation), len(challenge.hints) - 1)
    print(f"Hint {shown + 1} of {len(challenge.hints)} for {operation}: {challenge.hints[shown]}")
    score["hints"][operation] = shown + 1
    write_score(folder, score)
    return 0


def load(path: Path, operation: str, name: str) -> Callable[..., Any]:
    """The learner's function. Raises Unusable."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        advice = f"write it with: uv run python -m foundation derive {operation}"
        raise Unusable(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except UnicodeDecodeError:
        raise Unusable(f"{path}: not UTF-8; save it in UTF-8") from None
    scope: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(source, str(path), "exec"), scope)
    except BaseException as error:  # an endless loop ends with Ctrl-C
        raise Unusable(f"{path}{_line(error, path)}: {what(error)}") from error
    if not callable(scope.get(name)):
        raise Unusable(f"{path}: has no function {name}; that is the name which is checked")
    return scope[name]


def what(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    from foundation.exercises import first_line

    if isinstance(error, KeyboardInterrupt):
        return "stopped with Ctrl-C"
    try:
        return f"{type(error).__name__}: {first_line(error)}"
    except BaseException:  # the learner's own class of errors
        return f"{type(error).__name__}: its message cannot be read"


def _line(error: BaseException, path: Path) -> str:
    """The line of the learner's file that an error came from."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _judge(operation: str, challenge: Challenge, answer_of: Callable[..., Any]) -> bool:
    """Runs every case; stops at the first wrong one. Raises Unusable where the function stops."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from foundation.challenges.reference import cases_of

    for case in cases_of(operation, challenge):
        named = f'{operation}, case "{case.name}"'
        try:
            answer = answer_of(*case.arguments)
            if answer is None:
                raise Unusable(f"not tried yet: {challenge.backward} returns None")
            wrong = case.judge(answer)
        except BaseException as error:  # of the function, or of an object that it returns
            path = Path(answer_of.__code__.co_filename) if hasattr(answer_of, "__code__") else Path()
            said = str(error) if isinstance(error, Unusable) else f"{path}{_line(error, path)}: {what(error)}"
            raise Unusable(f"{named}\n  {said}") from error
        if wrong.wrong:
            print(f"{named}\n  {wrong.wrong}\n  {wrong.meaning}")
            return False
        print(f"{named:<50} ok", flush=True)
    return True
