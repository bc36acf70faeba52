"""A bug is planted in one function of foundation. Find it from the table.

The table with it takes one to two minutes on two free cores. With a CHAPTER,
as in `python -m foundation hunt 7`, only the rows up to it are printed.

No file is changed: the bug lives in the process that prints the table. Only its
name is kept, scrambled, in the score file of your folder, with the hunts that
you have won.
"""

import argparse
import base64
import importlib
import random
import sys
from pathlib import Path
from typing import Any

from foundation.challenges.derive import parser_of
from foundation.challenges.folder import read_score, write_score
from foundation.challenges.planting import BUGS, Bug, planted
from foundation.chapters import CHAPTERS, OPERATIONS, unknown

HUNTED = [bug for bug in BUGS if bug.seen_in_the_table]


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 for a wrong answer or no hunt, 2 for an unknown name."""
    parser = parser_of("hunt", __doc__)
    parser.add_argument("chapter", nargs="?", metavar="CHAPTER", help="only bugs of operations up to this chapter")
    parser.add_argument("--seed", type=int, help="the same bug for all who give this number and chapter")
    parser.add_argument("--look", metavar="OPERATION", help="the first wrong entry of each result")
    parser.add_argument("--answer", metavar="FUNCTION", help="where it is, such as softmax_backward")
    parser.add_argument("--give-up", action="store_true", help="say which it was")
    arguments = parser.parse_args(argv)
    operations = _up_to(arguments.chapter)
    if not operations:
        known = f"give a chapter from 2 to {CHAPTERS[-1].number}"
        print(f"hunt {arguments.chapter}: no operation to plant a bug in; {known}", file=sys.stderr)
        return 2
    score = read_score(arguments.folder)
    bug = next((bug for bug in HUNTED if scrambled(bug.name) == score["hunt"]["planted"]), None)
    if arguments.answer is None and arguments.look is None and not arguments.give_up:
        return _begin(arguments, score, operations, bug)
    if bug is None:
        print("no bug is planted; begin with: uv run python -m foundation hunt", file=sys.stderr)
        return 1
    if arguments.look is not None:
        return _look(arguments.look, bug)
    if arguments.give_up:
        print(f"It was: {bug.name}")
        return _end(arguments.folder, score, bug, "given_up")
    return _answer(arguments, score, bug)


def scrambled(text: str) -> str:
    """A text, so that a glance at the score file does not give it away."""
    return base64.b64encode(text.encode()[::-1]).decode()


def _up_to(chapter: str | None) -> tuple[str, ...]:
    """The operations of the chapters up to this one; all without a chapter. Empty for an unknown chapter, and for one
    before the first operation."""
    if chapter is None:
        return OPERATIONS
    numbers = [c.number for c in CHAPTERS]
    number = chapter.lstrip("0") or "0"
    if number not in numbers:
        return ()
    return tuple(name for c in CHAPTERS[: numbers.index(number) + 1] for name in c.operations)


def _drawn(bugs: list[Bug], hunt: dict[str, Any], seed: int | None) -> Bug:
    """A bug that was not hunted before, as long as there is one. A seed draws from all, the same for everybody."""
    new = [bug for bug in bugs if scrambled(bug.name) not in hunt["before"]]
    return random.Random(seed).choice(bugs if seed is not None else new or bugs)


def _begin(arguments: argparse.Namespace, score: dict[str, Any], operations: tuple[str, ...], bug: Bug | None) -> int:
    """Plants a bug of one of the operations, and prints their rows. For a hunt that is on, prints its failed rows
    again, without the table."""
    hunt, seed = score["hunt"], arguments.seed
    if bug is None or seed is not None:
        bug = _drawn([bug for bug in HUNTED if bug.caught_by in operations], hunt, seed)
        hunt |= {"planted": scrambled(bug.name), "tries": 0, "failed": []}
        write_score(arguments.folder, score)
        print("A bug has been planted. Which function is it in?\n")
    else:
        print("The same bug is still planted.\n")
    if not hunt["failed"]:  # or the table did not end
        hunt["failed"] = _table(bug, operations)
        write_score(arguments.folder, score)
        print()
    print(f"{len(hunt['failed'])} failed:", *hunt["failed"], sep="\n  ")
    print("\nLook closer: uv run python -m foundation hunt --look OPERATION")
    print("Answer with a function: uv run python -m foundation hunt --answer softmax_backward")
    return 0


def _table(bug: Bug, operations: tuple[str, ...]) -> list[str]:
    """Prints the rows of the operations with the bug planted. Returns those that failed."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from foundation import table
    from foundation.checks import checks_of

    with planted(bug):
        outcomes = table.rows((check for name in operations for check in checks_of(name)), _outcome)
    return [outcome.name for outcome in outcomes if not outcome.passed]


def _outcome(check: Any) -> Any:
    from foundation.parity import Outcome, run

    try:
        return run(check)
    except (ValueError, TypeError):  # a gradient whose shape is wrong
        return Outcome(check.name, float("nan"), None)


def _look(operation: str, bug: Bug) -> int:
    """Prints what is wrong in the cases of one operation that fail."""
    if operation not in OPERATIONS:
        print(unknown("operation", operation, list(OPERATIONS), "one of the table"), file=sys.stderr)
        return 2
    import jax

    jax.config.update("jax_enable_x64", True)
    import numpy as np
    from jax.tree_util import keystr, tree_leaves_with_path

    from foundation.challenges.diagnosis import Named, examine
    from foundation.checks import checks_of
    from foundation.parity import answers

    with planted(bug):
        for check in checks_of(operation):
            try:
                by_hand, right, _ = answers(check, differences=False)
            except (ValueError, TypeError) as error:
                print(f"{check.name}\n  the function stops: {type(error).__name__}")
                continue
            known = [Named(keystr(p), np.asarray(leaf)) for p, leaf in tree_leaves_with_path(check.inputs)]
            findings = [
                examine(f"{'d' if hasattr(check, 'backward') else 'result'}{keystr(path)}", ours, wanted, known)
                for (path, wanted), (_, ours) in zip(*map(tree_leaves_with_path, (right, by_hand)), strict=False)
            ]
            wrong = [finding for finding in findings if finding.wrong]
            print(f"{check.name} {'' if wrong else 'ok'}")
            for finding in wrong:
                print(f"  {finding.wrong}\n    {finding.meaning}")
    return 0


def _functions() -> list[str]:
    """module.function of everything that may have a bug."""
    modules = dict.fromkeys(bug.place.partition(".")[0] for bug in BUGS)
    found = ((name, vars(importlib.import_module(f"foundation.{name}"))) for name in modules)
    return [
        f"{module}.{name}"
        for module, scope in found
        for name, value in scope.items()
        if callable(value) and getattr(value, "__module__", "") == f"foundation.{module}" and name.islower()
    ]


def _answer(arguments: argparse.Namespace, score: dict[str, Any], bug: Bug) -> int:
    """Judges an answer: a function, with its module or without."""
    places = _functions()
    given = arguments.answer.removeprefix("foundation.").removesuffix("()")
    named = [place for place in places if given in (place, place.partition(".")[2])]
    if not named:
        functions = sorted(place.partition(".")[2] for place in places)
        print(unknown("function", arguments.answer, functions, "the name of a function"), file=sys.stderr)
        return 2
    score["hunt"]["tries"] += 1
    if bug.place in named:
        print(f"Found, at try {score['hunt']['tries']}: {bug.name}")
        return _end(arguments.folder, score, bug, "found")
    write_score(arguments.folder, score)
    print(f"Not in {named[0]}. A function that others use fails their rows too:")
    print("look for the smallest operation that fails.")
    return 1


def _end(folder: Path, score: dict[str, Any], bug: Bug, how: str) -> int:
    print(f"  in {bug.place}: `{bug.old}` had become `{bug.new}`")
    hunt = score["hunt"]
    hunt[how] += 1
    hunt["before"].append(hunt["planted"])
    hunt |= {"planted": "", "failed": [], "tries": 0}
    write_score(folder, score)
    print(f"\nScore: {hunt['found']} found, {hunt['given_up']} given up. Another: uv run python -m foundation hunt")
    return 0
