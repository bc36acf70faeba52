"""Plants a bug in `foundation`, and takes it out again.

A bug is a replacement in the source of one function. Most break a gradient, and must fail a parity check of
the operation named. Those that change the forward pass along with the backward one agree with autodiff, so
they must fail a test of the forward pass instead: it is named with `test:`.

The tests plant each of them. `python -m foundation hunt` plants one that the table shows. The bugs are in `bugs.py`.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Bug(NamedTuple):
    """`old`, which occurs once in the source of module.function, becomes `new`; `caught_by` must then
    fail."""

    name: str
    place: str
    old: str
    new: str
    caught_by: str

    @property
    def seen_in_the_table(self) -> bool:
        """Whether a row of the table fails, and not only a test of the forward pass."""
        return not self.caught_by.startswith("test:")


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug's function with its source replaced.

    Its code object is exchanged, so every module that has imported the function runs the bug. The old text
    must occur exactly once, so that a bug can't go stale when the source changes.
    """
    module_name, function_name = bug.place.split(".")
    module = importlib.import_module(f"foundation.{module_name}")
    function = inspect.unwrap(getattr(module, function_name))  # within the wrappers of jaxtyping
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.old!r} occurs {source.count(bug.old)} times in {bug.place}")
    changed = source.replace(bug.old, bug.new)
    scope: dict = dict(vars(module))
    exec(compile(changed[changed.index("def ") :], bug.place, "exec"), scope)  # without decorators
    original = function.__code__
    function.__code__ = scope[function_name].__code__
    try:
        yield
    finally:
        function.__code__ = original
