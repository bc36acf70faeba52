"""Certificate: one claim about a model, and the result of its test."""

from typing import NamedTuple


class Certificate(NamedTuple):
    """One tested claim: what was found, what was asked for, and whether the test passed."""

    name: str
    passed: bool
    found: str
    asked: str
