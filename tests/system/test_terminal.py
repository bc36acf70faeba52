"""Wrapping of a text that arrives in pieces, broken streams, and keys that are typed while a program works."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.system.terminal import escape_controls, wrapped

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["one two three"], "one two\nthree"),
        (["on", "e tw", "o th", "ree"], "one two\nthree"),
        (["a\nb\n\nc"], "a\nb\n\nc"),
        (["a  b"], "a  b"),
        (["inseparable word"], "inseparable\nword"),
        (["日本 語語"], "日本\n語語"),  # two columns each
        (["\x1b\x1b a"], "\x1b\x1b\na"),  # shown as \\x1b, four columns each
        (["a\tb"], "a\nb"),
        ([""], ""),
    ],
)
def test_lines_break_at_spaces(pieces: list[str], expected: str) -> None:
    assert "".join(wrapped(pieces, 8)) == expected


@given(st.lists(st.text(st.sampled_from("ab \n"), max_size=6), max_size=12), st.integers(1, 20))
def test_nothing_is_lost_and_no_line_is_wide(pieces: list[str], width: int) -> None:
    """But for spaces at the end of a line, and for words that are longer than a line."""
    text, shown = "".join(pieces), "".join(wrapped(pieces, width))
    assert shown.split() == text.split()
    assert all(len(line) <= width or len(line.split()) == 1 for line in shown.split("\n"))
    assert "".join(wrapped([text], width)) == shown


def test_an_indent_stays_and_a_word_is_shown_once_its_end_is_known() -> None:
    assert "".join(wrapped(["  one two three"], 8, indent="  ")) == "  one\n  two\n  three"
    read: list[str] = []
    pieces = (read.append(piece) or piece for piece in ("On", "ce", " up", "on", "\n"))
    assert [(word, len(read)) for word in wrapped(pieces, 80)] == [("Once", 3), (" upon", 5), ("\n", 5)]


PRINTS = """
import os, sys
from moe_jax.system import terminal
terminal.guard_streams()
if sys.argv[1] == "outlives":
    terminal.outlive_output()
file = os.open(os.devnull, os.O_RDONLY)  # must not get the number of a closed stream
print("error", file=sys.stderr)
try:
    print("output")
    sys.stdout.flush()
except terminal.OutputLost as lost:
    os._exit(3 if lost.reader_left else 4)
os._exit(0 if file > 2 else 5)
"""


@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 4), ("2>/dev/full", 0), ("| true", 3)],
)
def test_broken_streams(redirection: str, status: int, tmp_path: Path) -> None:
    """An error on stderr never ends a program; one on stdout does, unless the program outlives its output."""
    for kind in ("ends", "outlives") if status else ("ends",):
        status_file = tmp_path / kind
        program = f'sleep 0.2; "$0" -c "$1" {kind}'
        line = f"({program}; echo $? >{status_file}) {redirection}"
        if "|" not in redirection:
            line = f"({program}) {redirection}; echo $? >{status_file}"
        subprocess.run(["sh", "-c", line, sys.executable, PRINTS], cwd=ROOT, check=False, capture_output=True)
        assert int(status_file.read_text()) == (status if kind == "ends" else 0)


def test_control_characters_are_shown() -> None:
    assert escape_controls("a\x1b[2J\tb\n\x9b") == "a\\x1b[2J\tb\n\\x9b"


WORKS = """
import readline, signal, time
from moe_jax.system.signals import interruptible
from moe_jax.system.terminal import keys_hidden
come = []
signal.signal(signal.SIGUSR1, lambda number, _: come.append(number))
with interruptible():
    with keys_hidden():
        print("working", flush=True)
        while not come:
            time.sleep(0.02)
    print("read", repr(input("> ")))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("interrupted", [False, True])
def test_keys_that_are_typed_early_appear_at_the_prompt_once(interrupted: bool) -> None:
    """And Ctrl-C leaves a terminal that shows keys again."""
    import termios

    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKS], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    shown = b""
    while not shown.endswith(b"working\r\n"):
        shown += os.read(ours, 99)
    os.write(ours, b"a cat\n")
    process.send_signal(signal.SIGINT if interrupted else signal.SIGUSR1)
    assert process.wait(60) == (130 if interrupted else 0)
    assert termios.tcgetattr(theirs)[3] & termios.ECHO
    os.close(theirs)
    with suppress(OSError):  # Linux says so where the other side is closed
        while piece := os.read(ours, 99):
            shown += piece
    os.close(ours)
    assert shown.count(b"a cat") == (0 if interrupted else 2)
    if not interrupted:
        assert b"> a cat\r\nread 'a cat'" in shown
