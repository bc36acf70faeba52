"""Certificate: one claim about a model, and the result of its test."""

from typing import NamedTuple


class Certificate(NamedTuple):
    """One tested claim: what was found, what was asked for, and whether the test passed."""

    name: str
    """It identifies the claim for other programs, and does not change."""
    passed: bool
    found: str
    asked: str
    title: str = ""
    """The claim in plain words, for people. Empty: the name is plain."""
