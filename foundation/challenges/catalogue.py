"""What can be derived: for each operation its module, and hints, the last of which is nearly the answer.

The standard library alone, so that a wrong name is answered at once.
"""

import inspect
from dataclasses import dataclass
from types import FunctionType

from foundation.challenges.planting import function_at, stanzas


class Unusable(Exception):
    """A learner's file, function or answer that cannot be used. The message says why."""


@dataclass(frozen=True)
class Challenge:
    """One backward pass to derive."""

    module: str
    """File of foundation that holds both functions."""
    name: str
    """NAME_forward is given, NAME_backward is to be written."""
    hints: tuple[str, ...]

    @property
    def backward(self) -> str:
        """Name of the function to write."""
        return f"{self.name}_backward"

    @property
    def functions(self) -> tuple[FunctionType, FunctionType]:
        """Both functions. Their module is loaded, and jax with it."""
        return function_at(f"{self.module}.{self.name}_forward"), function_at(f"{self.module}.{self.backward}")

    def unpacking(self) -> list[str]:
        """The lines of the backward pass that take the cache apart: they are given."""
        lines = map(str.strip, inspect.getsource(self.functions[1]).splitlines())
        return [line for line in lines if line.endswith("= cache")]


def _challenge(stanza: str) -> Challenge:
    """From an operation's module and name, and below them its hints."""
    place, *hints = stanza.splitlines()
    module, name = place.split(".")
    return Challenge(module, name, tuple(hint.strip() for hint in hints))


CHALLENGES = {challenge.name: challenge for challenge in map(_challenge, stanzas("hints.txt"))}
"""The challenge of each operation."""
