"""Standard output and standard error that cannot break a program, and cannot command a terminal.

A standard stream may be closed at the start (`>&-`), full (`>/dev/full`), or lose its reader (`| head`). An error on
stderr never ends a program. An error on stdout ends a program that is run for its output, by `OutputLost`; it does not
end a program that has called `outlive_output`, as training does.

On a terminal, control characters of printed text are shown as `\\x1b`, because a text may come from a model or a
stranger. Newline and tab stay. `system.rich_console` writes the colours of this project past this guard.

Standard library only: `settle` runs before anything else.
"""

import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape_controls(text: str) -> str:
    """The text with `\\x1b` in place of ESC, and so on, for all control characters but newline and tab."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class OutputLost(Exception):
    """Standard output cannot be written any more. Not an OSError, because libraries catch those."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.reader_left = error.errno == errno.EPIPE


class _Descriptor(io.FileIO):
    """The raw file of a standard stream. Its first write error may raise OutputLost; after it, text is discarded."""

    def __init__(self, number: int, outlived: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.outlived = outlived
        """Whether the program goes on after a write error."""
        self._failed = False

    def write(self, data: Any, /) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                self._fail(error)
                return memoryview(data).nbytes
            if written is not None:
                return written
            select.select([], [self], [])  # another program has made the terminal non-blocking

    def _fail(self, error: OSError) -> None:
        first, self._failed = not self._failed, True
        if first and not self.outlived:
            raise OutputLost(error)
        if first and self.fileno() != 2:
            print(f"standard output cannot be written ({error.strerror}); the work goes on without it", file=sys.stderr)


class _Stream(io.TextIOWrapper):
    """A standard stream. On a terminal, control characters of the text are escaped."""

    def __init__(self, before: TextIO | None, descriptor: _Descriptor, errors: str) -> None:
        unbuffered = getattr(before, "write_through", False)  # python -u
        self.descriptor, self.guards = descriptor, descriptor.isatty()
        super().__init__(
            descriptor if unbuffered else io.BufferedWriter(descriptor),  # pyright: ignore[reportArgumentType]
            encoding=before.encoding if before is not None else "utf-8",
            errors=errors,
            line_buffering=descriptor.fileno() == 2 or self.guards,
            write_through=unbuffered,
        )

    def write(self, text: str, /) -> int:
        if not self.guards:
            return super().write(text)
        # Progress bars of libraries go back to the start of their line on stderr.
        lines = text.split("\r") if self.descriptor.fileno() == 2 else [text]
        super().write("\r".join(map(escape_controls, lines)))
        return len(text)


class Unguarded:
    """A stream whose control characters reach the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if isinstance(self._stream, _Stream):
            return io.TextIOWrapper.write(self._stream, text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def settle() -> None:
    """Open descriptors that were closed at the start, and replace stdout and stderr by streams as described above.

    A closed descriptor must be opened first. Otherwise the next file of the program, such as a checkpoint, would get
    its number, and messages would be written into that file.
    """
    if os.name != "posix":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
    # Tests and notebooks replace the streams by their own, which stay. A character may not exist in the encoding.
    if sys.stdout is sys.__stdout__:
        _flush(sys.stdout)
        sys.stdout = _Stream(sys.__stdout__, _Descriptor(1, outlived=False), "replace")
    if sys.stderr is sys.__stderr__:
        _flush(sys.stderr)
        sys.stderr = _Stream(sys.__stderr__, _Descriptor(2, outlived=True), "backslashreplace")


def keep_apart(quiet: bool) -> None:
    """Discard what libraries print on standard output by themselves, as gloo does. `quiet` discards what this program
    prints there too. Nothing changes where tests and notebooks have replaced the stream."""
    if not isinstance(sys.stdout, _Stream):
        return
    _flush(sys.stdout)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    own = nowhere if quiet else os.dup(1)
    os.dup2(nowhere, 1)
    sys.stdout = _Stream(sys.stdout, _Descriptor(own, outlived=True), "replace")


def _flush(stream: TextIO | None) -> None:
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()


def outlive_output() -> None:
    """From now on no error on stdout ends the program. The work matters more than its messages."""
    if isinstance(sys.stdout, _Stream):
        sys.stdout.descriptor.outlived = True
