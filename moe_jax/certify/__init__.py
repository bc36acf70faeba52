"""Claims about a model that are tested by running and compiling it: `python -m moe_jax certify`.

model.py        every certificate of a model; each program is compiled once
causality.py    no token changes an earlier output
arithmetic.py   the arithmetic of the compiled programs
formulas.py     what that arithmetic must be
hlo.py          the matrix products of a compiled program, read from its text
"""

from typing import NamedTuple


class Certificate(NamedTuple):
    """One tested claim: what the test measured, what was asked for, and whether the test passed."""

    name: str
    """It identifies the claim for other programs, and does not change."""
    passed: bool
    found: str
    asked: str
    title: str = ""
    """The claim in plain words, for people. Empty: the name is plain."""
