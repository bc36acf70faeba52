"""What a program prints: streams that cannot break it, lines that fit a terminal, tables, and progress on stderr.

A standard stream may be closed at the start (`>&-`), full (`>/dev/full`), or lose its reader (`| head`). An error on
stderr never ends a program. An error on stdout ends a program that is run for its output, by `OutputLost`. It does not
end a program that has called `outlive_output`, as training does.

On a terminal, control characters of printed text are shown as `\\x1b`, because a text may come from a model or a
stranger. Newline and tab stay. The colours of `rich_console` pass.

rich is imported when it is needed: what runs before the arguments are accepted imports the standard library only.
"""

import errno
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WORDS = re.compile(r"\n|[^\S\n]+|\S+")

Report = Callable[[int, int], None]
"""Called with the items and the bytes done so far."""


def escape_controls(text: str) -> str:
    """The text with `\\x1b` in place of ESC, and so on, for all control characters but newline and tab."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


class OutputLost(Exception):
    """Standard output cannot be written any more. Not an OSError, because libraries catch those."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.reader_left = error.errno == errno.EPIPE


class GuardedStream:
    """stdout or stderr. Its first write error may raise OutputLost; after it, text goes to the null device."""

    def __init__(self, stream: TextIO, outlived: bool, raw: bool = False) -> None:
        self.stream, self.outlived, self.raw = stream, outlived, raw
        """`outlived`: whether the program goes on after a write error. `raw`: control characters pass."""
        self._is_terminal, self._is_stderr = stream.isatty(), stream is sys.__stderr__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        # Progress bars of libraries go back to the start of their line on stderr.
        lines = text.split("\r") if self._is_stderr else [text]
        shown = "\r".join(map(escape_controls, lines)) if self._is_terminal and not self.raw else text
        try:
            self.stream.write(shown)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())  # what is still in a buffer goes there too
        os.close(nowhere)
        if not self.outlived:
            raise OutputLost(error)
        if not self._is_stderr:
            print(f"standard output cannot be written ({error.strerror}); the work goes on without it", file=sys.stderr)


def guard_streams() -> None:
    """Open descriptors that were closed at the start, and replace stdout and stderr by streams as described above.

    A closed descriptor must be opened first. Otherwise the next file of the program, such as a checkpoint, would get
    its number, and messages would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so the reader can say where the text is not UTF-8, and go on
    # Tests and notebooks replace the streams by their own, which stay. A character may not exist in the encoding.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, 1, outlived=False, errors="replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, 2, outlived=True, errors="backslashreplace")


def _guarded(stream: TextIO | None, number: int, outlived: bool, errors: str) -> Any:
    stream = stream or os.fdopen(number, "w", encoding="utf-8", closefd=False)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)
    return GuardedStream(stream, outlived)


def keep_apart(quiet: bool) -> None:
    """Discard what libraries print on standard output by themselves, as gloo does. `quiet` discards what this program
    prints there too. Nothing changes where tests and notebooks have replaced the stream."""
    if not isinstance(sys.stdout, GuardedStream):
        return
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    own = os.fdopen(nowhere if quiet else os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)
    os.dup2(nowhere, 1)
    sys.stdout = GuardedStream(own, outlived=False)
    outlive_output()


def outlive_output() -> None:
    """From now on no error on stdout ends the program. The work matters more than its messages."""
    if isinstance(sys.stdout, GuardedStream):
        sys.stdout.outlived = True


def rich_console(*, stderr: bool = False, **settings: Any) -> "Console":
    """The console of rich for this project. It writes colours to the terminal, and escapes the control characters of a
    text."""
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control or not self.is_terminal:
                    yield segment
                else:
                    yield Segment(escape_controls(segment.text), segment.style)

    file: Any = sys.stderr if stderr else sys.stdout
    if isinstance(file, GuardedStream):
        file = GuardedStream(file.stream, file.outlived, raw=True)
    return Escaping(file=file, highlight=False, **settings)


def say(*lines: object) -> None:
    """Print lines: broken at spaces on a terminal, whole in a file or a pipe."""
    if not lines:
        return
    if not sys.stdout.isatty():
        print(*lines, sep="\n", flush=True)
        return
    width = shutil.get_terminal_size().columns
    for line in "\n".join(map(str, lines)).split("\n"):
        print(*wrapped([line], width, indent=line[: len(line) - len(line.lstrip())]), sep="", flush=True)


def stream_text(start: str, pieces: Iterable[str]) -> None:
    """Print a text as its pieces arrive, and a line end. On a terminal each word is shown once its end is known."""
    text: Iterable[str] = itertools.chain([start], pieces)
    try:
        for piece in wrapped(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text:
            print(piece, end="", flush=True)
    finally:  # after Ctrl-C, too
        print(flush=True)


def wrapped(pieces: Iterable[str], width: int, indent: str = "") -> Iterator[str]:
    """The text of the pieces, its lines broken at spaces. A word comes once its end is known, so no line breaks in one.

    A word longer than a line stays whole; the terminal breaks it. `indent` begins each line after a break.
    """
    column, space, word = 0, "", ""
    for piece in itertools.chain(pieces, [None]):
        parts = _WORDS.findall(word + (piece or ""))
        word = parts.pop() if piece is not None and parts and parts[-1].strip() else ""  # the next piece may go on
        for part in parts:
            if part == "\n":
                column, space = 0, ""
                yield part
            elif part.isspace():
                space += part
            else:
                size = _columns(space) + _columns(part)
                if column and column + size > width:
                    column, space, size = 0, "\n" + indent, _columns(indent) + _columns(part)
                yield space + part
                column, space = column + size, ""


def _columns(text: str) -> int:
    """The columns that a text takes on a terminal at most."""
    from rich.cells import cell_len

    return cell_len(escape_controls(text).replace("\t", " " * 8))


@contextmanager
def keys_hidden() -> Iterator[None]:
    """Do not show the keys that are typed meanwhile. They wait for what reads the terminal next, such as a prompt.

    Nothing without a terminal, and in the background, where a change of the terminal would stop the program.
    """
    global _modes
    if _modes is not None or not (sys.stdin and sys.stdin.isatty() and _has_terminal()):
        yield
        return
    import termios

    _modes = termios.tcgetattr(sys.stdin)
    quiet = [*_modes]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        show_keys()


def show_keys() -> None:
    """End `keys_hidden`, also from a process that ends without leaving its contexts."""
    global _modes
    modes, _modes = _modes, None
    if modes is not None and _has_terminal():
        import termios

        with suppress(termios.error):  # it was closed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)


_modes: list[Any] | None = None
"""The modes of the terminal before `keys_hidden`. None outside of it."""


def _has_terminal() -> bool:
    """Whether this process may change the terminal that is its input."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except AttributeError:  # Windows
        return False
    except OSError:  # it controls no process
        return True


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner and what is done, while it is done. Nothing if stderr is not a terminal. The work must not
    print."""
    if not sys.stderr.isatty():
        yield
        return
    with keys_hidden(), rich_console(stderr=True).status(what):
        yield


@contextmanager
def progress_bar(what: str, total: int, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` steps or bytes are done, and the time left: a bar on a terminal, nothing elsewhere. Call
    the result with what each part adds."""
    if not sys.stderr.isatty():
        yield lambda added: None
        return
    from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TransferSpeedColumn

    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    columns = (*Progress.get_default_columns(), *counts)
    with Progress(*columns, console=rich_console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda added: bar.advance(task, added)


@contextmanager
def document_progress(what: str, shown: bool = True) -> Iterator[Report]:
    """Show on a terminal how many documents and bytes have been read, and elsewhere a line at the end."""
    if not shown:
        yield lambda count, size: None
        return
    begin, line = monotonic(), f"{what}: 0 documents"
    status = rich_console(stderr=True).status(what) if sys.stderr.isatty() else None

    def report(count: int, size: int) -> None:
        nonlocal line
        seconds = monotonic() - begin + 1e-9
        rates = f"{count / seconds:,.0f} documents/s, {size / seconds / 1e6:.1f} MB/s"
        line = f"{what}: {count:,} documents, {size / 1e6:.1f} MB ({rates})"
        if status is not None:
            status.update(line)

    with status or nullcontext():
        yield report
    print(line, file=sys.stderr, flush=True)
