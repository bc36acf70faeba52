"""The page of the planted bugs: first those that happened in public, as stories; then the others, with their checks."""

import difflib
import tomllib
from pathlib import Path
from typing import NamedTuple

from foundation.challenges.planting import BUGS, Bug


class Sighting(NamedTuple):
    """A public issue in which a bug was found. What each field says is at the top of `museum.toml`."""

    issue: str
    title: str
    symptom: str
    cause: str


_TEXTS = tomllib.loads(Path(__file__).with_name("museum.toml").read_text(encoding="utf-8"))
SIGHTINGS = {bug: Sighting(**texts) for bug, texts in _TEXTS.items()}
"""Name of a planted bug -> where it was found in public."""

INTRODUCTION = """# The bug museum

A gradient that is wrong seldom stops a program. The loss still falls, a little slower. {seen} times it happened in
public code, written by people who know the subject well. A symptom is what such a mistake shows; how it was found
is in the linked issue. Each story ends with the check that catches the mistake here.

The same mistakes, or close relatives, are planted in `foundation/` by a test, one at a time, with others: {count} in
all. Each must be caught by name: by a row of the table (`uv run python -m foundation NAME`), or by a test of the
forward pass. `uv run python -m foundation hunt` plants one for you to find.

## Seen in public
"""


def page() -> str:
    """The page, as MyST Markdown: first the public cases as stories, then the other planted bugs by module."""
    bugs = {bug.name: bug for bug in BUGS}
    parts = [INTRODUCTION.format(count=len(BUGS), seen=len(SIGHTINGS))]
    parts += [_story(bugs[name], sighting) for name, sighting in SIGHTINGS.items()]
    parts.append("## Planted by us\n")
    modules: dict[str, list[Bug]] = {}
    for bug in BUGS:
        if bug.name not in SIGHTINGS:
            modules.setdefault(bug.place.partition(".")[0], []).append(bug)
    for module, planted in modules.items():
        parts.append(f"### `foundation/{module}.py`\n")
        parts += [f"#### {_title(bug)}\n\n{_change(bug)}\n{_check(bug)}\n" for bug in planted]
    return "\n".join(parts)


def _story(bug: Bug, sighting: Sighting) -> str:
    repository, number = sighting.issue.split("#")
    return (
        f"### {sighting.title}\n\n[{sighting.issue}](https://github.com/{repository}/issues/{number})\n\n"
        f"**Symptom.** {sighting.symptom}\n\n**Cause.** {sighting.cause} Planted here as `{bug.name}`:\n\n"
        f"{_change(bug)}\n**Check.** {_check(bug)}\n"
    )


def _title(bug: Bug) -> str:
    title = bug.name.partition(": ")[2] or bug.name
    return title if title[1:2] == " " else title[0].upper() + title[1:]  # `f` is a symbol


def _change(bug: Bug) -> str:
    """The changed lines, as a block of Markdown."""
    changed = difflib.ndiff(bug.old.splitlines(), bug.new.splitlines())
    lines = "\n".join(line for line in changed if not line.startswith("?"))
    return f"```diff\n{lines}\n```\n"


def _check(bug: Bug) -> str:
    """What catches the bug, and where it is."""
    kind, _, test = bug.caught_by.partition(":")
    caught = f"Caught by the test `{test}`" if test else f"Caught by `python -m foundation {kind}`"
    place = f"`{bug.place}`" if "._" in bug.place else f"[`{bug.place}`](foundation.{bug.place})"
    return f"{caught}, in {place}."
