"""What reaches a terminal: no control characters, lines broken at spaces; elsewhere the text as it is."""

import io
import sys

import pytest

from moe_jax.system.terminal import document_progress, escape_controls, progress_bar, rich_console, say, stream_text

STRANGE = "a\x1b[2J\tb\n\x9b"


class Screen(io.StringIO):
    """A terminal of 20 columns."""

    def isatty(self) -> bool:
        return True


def test_control_characters_are_shown() -> None:
    assert escape_controls(STRANGE) == "a\\x1b[2J\tb\n\\x9b"


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    say("one two three four five [red]", 6)
    stream_text("start", ["\x1b]0;title\x07", " end"])
    rich_console().print("[bold]x\x07[/bold]")
    shown = screen.getvalue()
    assert shown.startswith("one two three four \nfive [red]\n6\nstart\\x1b]0;title\\x07 end\n")
    assert "\x07" not in shown
    assert "\x1b[1m" in shown, "colours pass"


def test_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    say("a line that is longer than eighty columns " * 3, STRANGE)
    stream_text("start", [STRANGE])
    with progress_bar("bar", 3) as advance:
        advance(1)
    with document_progress("tokenizing") as report:
        report(2, 2_000_000)
    shown = capsys.readouterr()
    assert shown.out == "a line that is longer than eighty columns " * 3 + f"\n{STRANGE}\nstart{STRANGE}\n"
    assert shown.err.startswith("tokenizing: 2 documents, 2.0 MB (")
