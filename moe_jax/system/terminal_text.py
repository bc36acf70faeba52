"""Text on a terminal, where lines break at spaces. In a file or a pipe the same text is unchanged."""

import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable

_WORDS = re.compile(r"\n|[^\S\n]+|\S+")


def say(*lines: object) -> None:
    """Print lines: broken at spaces on a terminal, whole in a file or a pipe."""
    if not sys.stdout.isatty():
        print(*lines, sep="\n", flush=True)
        return
    width = shutil.get_terminal_size().columns
    for line in "\n".join(map(str, lines)).split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        words = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(line, width, **words), flush=True)


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

    def __init__(self, width: int) -> None:
        self._width, self._column, self._space, self._word = width, 0, "", ""

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
        from rich.cells import cell_len

        if part == "\n":
            self._column, self._space = 0, ""
            return "\n"
        if part.isspace():
            self._space += part
            return ""
        space, self._space = self._space, ""
        size = cell_len(part)
        if self._column and self._column + cell_len(space) + size > self._width:
            self._column = size
            return "\n" + part
        self._column += cell_len(space) + size
        return space + part
