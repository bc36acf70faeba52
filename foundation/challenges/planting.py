"""Plants a bug in `foundation`, and takes it out again.

A bug is a replacement in the source of one function. Most break a gradient, and must fail a parity check of
the function's operation, or of another one that is named. Those that change the forward pass along with the
backward one agree with autodiff, so they must fail a test of the forward pass instead: it is named with `test:`.

The tests plant each of them. `python -m foundation hunt` plants one that the table shows. The bugs are in `bugs.txt`,
one for each idea, by chapter. A name's second half is also what `check` says to an answer that has this bug.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import NamedTuple


class Bug(NamedTuple):
    """`old`, which occurs once in the source of module.function, becomes `new`."""

    name: str
    place: str
    old: str
    new: str
    seen_in: str = ""
    """What fails, where it is not the function's own operation."""

    @property
    def caught_by(self) -> str:
        """An operation, or a test."""
        return self.seen_in or self.place.partition(".")[2].removesuffix("_forward").removesuffix("_backward")

    @property
    def seen_in_the_table(self) -> bool:
        """Whether a row of the table fails, and not only a test of the forward pass."""
        return not self.caught_by.startswith("test:")

    @property
    def function(self) -> FunctionType:
        """The function that has the bug."""
        return function_at(self.place)


def stanzas(file: str) -> list[str]:
    """The stanzas of a text beside this module: a line, and the indented lines below it."""
    return re.split(r"\n(?=\S)", Path(__file__).with_name(file).read_text(encoding="utf-8").strip())


def _bug(stanza: str) -> Bug:
    """From its name, its place, the old text and the new one, and what fails if not the function's own operation."""
    name, *change = map(str.strip, stanza.splitlines())
    found = re.fullmatch(r"(\S+): `(.+)` -> `(.*)`(?:, seen in (\S+))?", " ".join(change))
    assert found, stanza
    return Bug(name, *found.groups(default=""))


BUGS = list(map(_bug, stanzas("bugs.txt")))


def function_at(place: str) -> FunctionType:
    """The function module.name of foundation, without the wrappers of jaxtyping."""
    module, _, name = place.partition(".")
    return inspect.unwrap(getattr(importlib.import_module(f"foundation.{module}"), name))


def tree_of(function: FunctionType, old: str = "", new: str = "") -> ast.FunctionDef:
    """A function's source, without decorators, and with one change.

    The old text must occur exactly once, so that a bug can't go stale when the source changes.
    """
    source = textwrap.dedent(inspect.getsource(function))
    if function.__name__ == "<lambda>":  # the value of a dict
        source = "def answer(" + source.partition("lambda ")[2].rstrip(",\n").replace(": ", "):\n    return ", 1)
    if old and source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {function.__name__}")
    tree = ast.parse(source.replace(old, new) if old else source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    return tree


def define(tree: ast.FunctionDef, scope: dict) -> None:
    """Runs a function's definition in a scope."""
    exec(compile(ast.fix_missing_locations(ast.Module([tree], [])), "<changed>", "exec"), scope)


@contextmanager
def exchanged(function: FunctionType, tree: ast.FunctionDef) -> Iterator[None]:
    """The function with another body.

    Its code object is exchanged, so every module that has imported the function runs the other one.
    """
    scope = dict(function.__globals__)
    define(tree, scope)
    original = function.__code__
    function.__code__ = scope[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = original


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug's function with its source replaced."""
    with exchanged(bug.function, tree_of(bug.function, bug.old, bug.new)):
        yield
