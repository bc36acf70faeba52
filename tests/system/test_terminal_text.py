"""Wrapping of a text that arrives in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.system.terminal_text import WordWrap


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(width)
    return "".join([*(wrap.feed(piece) for piece in pieces), wrap.finish()])


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
    assert wrapped(pieces, 8) == expected


@given(st.lists(st.text(st.sampled_from("ab \n"), max_size=6), max_size=12), st.integers(1, 20))
def test_nothing_is_lost_and_no_line_is_wide(pieces: list[str], width: int) -> None:
    """But for spaces at the end of a line, and for words that are longer than a line."""
    text, shown = "".join(pieces), wrapped(pieces, width)
    assert shown.split() == text.split()
    assert all(len(line) <= width or len(line.split()) == 1 for line in shown.split("\n"))
    assert wrapped([text], width) == shown


def test_an_indent_stays() -> None:
    wrap = WordWrap(8, indent="  ")
    assert wrap.feed("  one two three") + wrap.finish() == "  one\n  two\n  three"


def test_a_word_is_shown_once_its_end_is_known() -> None:
    wrap = WordWrap(80)
    assert [wrap.feed(piece) for piece in ("On", "ce", " up", "on", "\n")] == ["", "", "Once", "", " upon\n"]
