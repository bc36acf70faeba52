"""Bugs to plant in `foundation`, one at a time and one for each idea, by chapter.

A name's second half is also what `check` says to an answer that has this bug.
"""

import re
from pathlib import Path

from foundation.challenges.planting import Bug

_BUGS = Path(__file__).with_name("bugs.txt").read_text(encoding="utf-8")
"""A bug's name; then its place, the old text and the new one, and what fails where that is not the function's own
operation."""


def _bug(lines: str) -> Bug:
    name, *change = map(str.strip, lines.splitlines())
    found = re.fullmatch(r"(\S+): `(.+)` -> `(.*)`(?:, seen in (\S+))?", " ".join(change))
    assert found, lines
    return Bug(name, *found.groups(default=""))


BUGS = [_bug(lines) for lines in re.split(r"\n(?=\S)", _BUGS.strip())]
