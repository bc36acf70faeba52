"""The chapters, the path through them, and which operations of the table belong to each. The standard library alone, so
that a wrong name is answered at once."""

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Chapter:
    """One notebook. What each field says is at the top of `lessons/chapters.toml`."""

    stem: str
    question: str
    minutes: int
    needs: str
    operations: Sequence[str] = ()
    production: Sequence[str] = ()

    @property
    def number(self) -> str:
        """As it is typed: 7."""
        return str(int(self.stem.partition("_")[0]))


_TABLE = (Path(__file__).parent / "lessons" / "chapters.toml").read_text(encoding="utf-8")
CHAPTERS = tuple(Chapter(**row) for row in tomllib.loads(_TABLE)["chapter"])
PATH = {
    "The course": ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    "Training": ("10", "13", "14", "17"),
    "Inference": ("11", "12", "15", "18"),
    "Systems": ("16", "19"),
    "Text": ("20",),
    "Alignment": ("21",),
}
"""The order in which to read: a course, then electives, each by itself. The README and the book's sidebar follow it."""
OPERATIONS = tuple(operation for chapter in CHAPTERS for operation in chapter.operations)


def part(name: str) -> tuple[Chapter, ...]:
    """The chapters of a part of the path, in its order."""
    numbered = {chapter.number: chapter for chapter in CHAPTERS}
    return tuple(numbered[number] for number in PATH[name])


class UnknownName(Exception):
    """A name that nobody knows. The message is one line, with the near names."""


def selected(names: list[str]) -> tuple[str, ...]:
    """The operations of the names, each an operation, or a chapter by its number or its notebook.

    Raises UnknownName.
    """
    chapters = {key: chapter for chapter in CHAPTERS for key in (chapter.number, chapter.stem[:2], chapter.stem)}
    found: list[str] = []
    for name in names:
        stem = name.removesuffix(".ipynb").removesuffix(".py")
        if name in OPERATIONS:
            found.append(name)
        elif stem not in chapters:
            known = f"an operation, or a chapter from 0 to {CHAPTERS[-1].number}"
            raise UnknownName(unknown("name", name, [*OPERATIONS, *chapters], known))
        elif not chapters[stem].operations:
            with_rows = ", ".join(chapter.number for chapter in CHAPTERS if chapter.operations)
            raise UnknownName(f"{name}: chapter without rows in the table; its notebook checks it. Rows: {with_rows}")
        else:
            found.extend(chapters[stem].operations)
    return tuple(dict.fromkeys(found))


def unknown(kind: str, name: str, known: list[str], allowed: str) -> str:
    """One line about an unknown name: the near names, or else what is allowed."""
    simple = {candidate.replace("_", ""): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), simple, n=3, cutoff=0.5)
    near += [key for key in simple if len(name) > 2 and name.lower() in key and key not in near][:3]
    advice = "near it: " + ", ".join(simple[key] for key in near) if near else f"give {allowed}"
    return f"{kind} {name}: unknown; {advice}"
