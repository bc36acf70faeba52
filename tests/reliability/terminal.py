"""A command in a pseudo-terminal of 80 columns: what a person sees."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

from tests.reliability import runs

COLUMNS = 80
_CODES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and movements of the cursor."""


def show(
    command: Sequence[str], cache: Path, typed: Sequence[str] = (), stderr: bool = True, **values: str
) -> tuple[int, bytes]:
    """Exit status, and all bytes that reached the terminal. A line of `typed` is typed at each prompt `> `.

    `values` are added to the environment."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = runs.environment(cache) | {"TERM": "xterm-256color"} | values
    for name in ("COLUMNS", "LINES", "NO_COLOR", "CI"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command,
        cwd=cache,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs if stderr else subprocess.PIPE,
    )
    os.close(theirs)
    shown, lines = b"", list(typed)
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # Linux says so where the other side is closed
            break
        if not piece:
            break
        shown += piece
        if lines and _CODES.sub(b"", shown).endswith(b"\n> "):
            os.write(ours, (lines.pop(0) + "\n").encode())
    os.close(ours)
    if process.stderr is not None:
        process.stderr.close()
    return process.wait(), shown


def lines(shown: bytes) -> list[str]:
    """The lines that stood on the terminal, one after the other. A line that was written over counts each time."""
    text = _CODES.sub(b"", shown).decode()
    return [line for part in text.split("\r\n") for line in part.split("\r")]
