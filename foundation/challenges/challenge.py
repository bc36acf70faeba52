"""What a learner can be asked to derive. The standard library alone."""

from dataclasses import dataclass


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
    spread: bool = False
    """Several outputs: the checks hold their cotangents in one tuple, and the function takes them one by one."""

    @property
    def forward(self) -> str:
        """Name of the function that is given."""
        return f"{self.name}_forward"

    @property
    def backward(self) -> str:
        """Name of the function to write."""
        return f"{self.name}_backward"
