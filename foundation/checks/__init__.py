"""Every operation at every input where it could go wrong: the rows of the table of `python -m foundation`.

The checks of a chapter are made by `checks` in the file of its name, such as `attention.py` for chapter 5.
"""

import importlib
from collections.abc import Iterator

from foundation.chapters import CHAPTERS, Chapter
from foundation.parity import AnyCheck


def _checks_in(chapter: Chapter) -> Iterator[AnyCheck]:
    return importlib.import_module(f"foundation.checks.{chapter.stem[3:]}").checks()


def all_checks() -> Iterator[AnyCheck]:
    """The whole catalogue, chapter by chapter."""
    for chapter in CHAPTERS:
        if chapter.operations:
            yield from _checks_in(chapter)


def checks_of(operation: str) -> Iterator[AnyCheck]:
    """The checks of one operation, made one at a time. Raises KeyError where there are none."""
    for chapter in CHAPTERS:
        if operation in chapter.operations:
            return (check for check in _checks_in(chapter) if check.operation == operation)
    raise KeyError(operation)
