"""Writes a file in which you derive one backward pass.

The file holds the forward pass and an empty function. Without OPERATION, the
command lists what can be derived. When you have written the function:

    python -m foundation check OPERATION          runs the real cases against it
    python -m foundation check OPERATION --hint   gives the next hint
"""

import argparse
import inspect
import sys
import textwrap
from pathlib import Path
from types import FunctionType

from foundation.challenges.catalogue import CHALLENGES, Challenge
from foundation.challenges.folder import FOLDER
from foundation.chapters import CHAPTERS, unknown

GIVES_AWAY = {"_rotate"}
"""Helpers whose name in the stub would be the answer."""


def find(name: str) -> Challenge | None:
    """The challenge of this name. Where there is none, prints the near names on one line."""
    if name not in CHALLENGES:
        print(unknown("operation", name, list(CHALLENGES), f"one of {', '.join(CHALLENGES)}"), file=sys.stderr)
    return CHALLENGES.get(name)


def parser_of(command: str, doc: str | None) -> argparse.ArgumentParser:
    """What `derive` and `check` have in common."""
    parser = argparse.ArgumentParser(
        prog=f"python -m foundation {command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"your folder (default {FOLDER})")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 2 for an unknown operation, 1 where the file cannot be written."""
    parser = parser_of("derive", __doc__)
    parser.add_argument("operation", nargs="?", help="as layernorm")
    arguments = parser.parse_args(argv)
    if arguments.operation is None:
        print(listing())
        return 0
    challenge = find(arguments.operation)
    if challenge is None:
        return 2
    path = arguments.folder / f"{arguments.operation}.py"
    try:
        if path.exists():
            print(f"{path}: is there already, and stays as it is; check it with {_check(arguments.operation)}")
            return 0
        arguments.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(stub(arguments.operation, challenge), encoding="utf-8")
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); give another --folder", file=sys.stderr)
        return 1
    print(f"{path}: fill in `{challenge.backward}`, then {_check(arguments.operation)}")
    return 0


def _check(operation: str) -> str:
    return f"uv run python -m foundation check {operation}"


def listing() -> str:
    """What can be derived, by chapter."""
    lines = ["What you can derive, easiest first in each chapter:", ""]
    for chapter in CHAPTERS:
        names = [operation for operation in chapter.operations if operation in CHALLENGES]
        if names:
            lines.append(f"  {chapter.number}  {', '.join(names)}")
    return "\n".join([*lines, "", "uv run python -m foundation derive softmax"])


def stub(operation: str, challenge: Challenge) -> str:
    """The text of the learner's file."""
    from foundation.challenges.reference import inputs_of

    given, asked = challenge.functions
    forward = textwrap.indent(inspect.getsource(given).rstrip(), "# ", lambda line: True)
    results = ", ".join(f"d_{name}" for name in inputs_of(operation, given))
    answer = f"({results})" if "," in results else results
    lines = [
        f'"""Derive the backward pass of {operation}.',
        "",
        f"    {_check(operation)}          what is wrong with it, if anything",
        f"    {_check(operation)} --hint   the next hint",
        "",
        "Each d_... is the derivative of the loss with respect to ...; each result has the shape of its input, and is",
        "None where the forward pass had no such input.",
        *(['In a type, a star as in "*rows" means any number of axes.'] if '"*' in forward else []),
        f"No need to look into foundation/{challenge.module}.py, which holds the derivation and an answer.",
        '"""',
        "",
        *_imports(asked),
        "",
        "# The forward pass, as it is in foundation:",
        "#",
        *(line.rstrip() for line in forward.splitlines()),
        "",
        "",
        f"def {challenge.backward}({', '.join(inspect.signature(asked).parameters)}):",
        *(f"    {line}" for line in challenge.unpacking()),
        f"    return None  # {answer}",
        "",
    ]
    return "\n".join(lines)


def _imports(backward: FunctionType) -> list[str]:
    """Import lines for what the answer may use: helpers and constants, and not the answer itself."""
    names = {"jnp"} | set(backward.__code__.co_names)
    lines = ["import jax.numpy as jnp"] if "math" not in names else ["import math", "import jax.numpy as jnp"]
    by_module: dict[str, list[str]] = {}
    for name in sorted(names - GIVES_AWAY):
        value = backward.__globals__.get(name)
        source = getattr(value, "__module__", backward.__module__)
        if isinstance(value, float) or (callable(value) and str(source).startswith("foundation.")):
            by_module.setdefault(source, []).append(name)
    if by_module:
        lines.append("")
    return lines + [f"from {source} import {', '.join(found)}" for source, found in sorted(by_module.items())]
