"""Text on a terminal, where lines break at spaces. In a file or a pipe the same text is unchanged."""

import itertools
import re
import shutil
import sys
from collections.abc import Iterable

from moe_jax.system.streams import escape_controls

_WORDS = re.compile(r"\n|[^\S\n]+|\S+")


def say(*lines: object) -> None:
    """Print lines: broken at spaces on a terminal, whole in a file or a pipe."""
    if not sys.stdout.isatty():
        print(*lines, sep="\n", flush=True)
        return
    width = shutil.get_terminal_size().columns
    for line in "\n".join(map(str, lines)).split("\n"):
        wrap = WordWrap(width, indent=line[: len(line) - len(line.lstrip())])
        print(wrap.feed(line) + wrap.finish(), flush=True)


def stream_text(start: str, pieces: Iterable[str]) -> None:
    """Print a text as its pieces arrive, and a line end. On a terminal each word is shown once its end is known."""
    wrap = WordWrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    try:
        for piece in itertools.chain([start], pieces):
            print(piece if wrap is None else wrap.feed(piece), end="", flush=True)
    finally:  # after Ctrl-C, too
        print("" if wrap is None else wrap.finish(), flush=True)


class WordWrap:
    """Breaks lines at spaces. A word is given out when its end is known, so a line never breaks inside one.

    A word longer than a line stays whole; the terminal breaks it.
    """

    def __init__(self, width: int, indent: str = "") -> None:
        """`indent` begins each line after a break."""
        self._width, self._indent = width, indent
        self._column, self._space, self._word = 0, "", ""

    def feed(self, piece: str) -> str:
        """The text that can be shown after one more piece."""
        found = _WORDS.findall(self._word + piece)
        if not found:
            return ""
        *ended, last = found
        if not last.strip():  # a space or a line end: the word before it has ended
            ended, last = [*ended, last], ""
        self._word = last
        return "".join(map(self._place, ended))

    def finish(self) -> str:
        """The rest of the text."""
        last, self._word = self._word, ""
        return self._place(last) if last else ""

    def _place(self, part: str) -> str:
        if part == "\n":
            self._column, self._space = 0, ""
            return "\n"
        if part.isspace():
            self._space += part
            return ""
        space, self._space = self._space, ""
        size = _columns(part)
        if self._column and self._column + _columns(space) + size > self._width:
            self._column = _columns(self._indent) + size
            return "\n" + self._indent + part
        self._column += _columns(space) + size
        return space + part


def _columns(text: str) -> int:
    """The columns that a text takes on a terminal at most: control characters are shown as \\x1b (`streams.py`)."""
    from rich.cells import cell_len

    return cell_len(escape_controls(text).replace("\t", " " * 8))
