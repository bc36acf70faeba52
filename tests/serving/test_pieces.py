"""Tokens become text: characters of several tokens, stop strings that tokens share, and what is held back."""

import random

import pytest

from moe_jax.serving.texts import Piece, TextPieces
from tests.serving import made


def fed(text: bytes, stop: list[str]) -> tuple[list[str], list[str], bool]:
    """The text that each byte gives out, the rest, and whether a stop string ended it."""
    pieces, out = TextPieces(made.run().tokenizer, stop), []
    for byte in text:
        out.append("".join(p.text for p in pieces.feed(Piece(byte, "", None, [], None, None))))
        if pieces.stopped:
            break
    return out, [p.text for p in pieces.finish()], pieces.stopped


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    assert fed(b"a\n\nb", ["\n\n"]) == (["a", "", ""], [], True)
    assert fed(b"a\nb", ["\n\n"]) == (["a", "", "\nb"], [], False)
    assert fed(b"a\n", ["\n\n"]) == (["a", ""], ["\n"], False)
    assert fed(b"xaab", ["aab"]) == (["x", "", "", ""], [], True)
    assert fed(b"xaab", ["b", "aab"])[0] == ["x", "", "", ""]  # of two that end together, the one that began first
    assert fed(b"xaaab", ["aab"])[0] == ["x", "", "", "a", ""]


def test_a_character_of_several_tokens_comes_whole() -> None:
    assert fed("é!".encode(), []) == (["", "é", "!"], [], False)
    assert fed("🙂".encode()[:3], []) == (["", "", ""], ["", "", "\ufffd"], False)
    assert fed(b"\xff\xffa", [])[0] == ["\ufffd", "\ufffd", "a"]


def test_a_token_is_cut_where_a_stop_string_begins_in_it() -> None:
    """The tokens "<|endoftext|>" (the separator has this text) and "x"."""
    pieces = TextPieces(made.run().tokenizer, ["of"])
    given = pieces.feed(Piece(made.SEPARATOR, "", None, [], None, None))
    assert [(p.token, p.text) for p in given] == [(made.SEPARATOR, "<|end")]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_stop_strings_the_text_is_cut_at_the_first(seed: int) -> None:
    """Oracle: the whole text, cut at the first occurrence that is complete first."""
    rng = random.Random(seed)
    text = "".join(rng.choice("abé") for _ in range(60))
    stop = ["".join(rng.choice("abé") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(0, 3))]
    out, rest, stopped = fed(text.encode(), stop)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    first = min((end for end, _ in ends), default=None)
    start = min((start for end, start in ends if end == first), default=len(text))
    assert "".join(out + rest) == text[:start]
    assert stopped == (first is not None)
