"""The words that samples begin with."""

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data.opening import opening_words, openings
from moe_jax.data.tokenizers import train_tokenizer

BYTES = train_tokenizer(DataConfig(tokenizer="byte"), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("Once upon a time, a dragon", "Once upon a time,"),
        ("ROMEO:\nBut soft, what light", "ROMEO:"),
        ("\n\n  Two words", "Two words"),
        ("One", "One"),
        ("a\tb  c d e", "a\tb  c d"),
        ("日本語の短い文章です。" * 40, ("日本語の短い文章です。" * 40)[:48]),
        ("é" * 127 + "語", "é" * 48),
        ("", ""),
    ],
)
def test_the_first_words_of_the_first_line(document: str, words: str) -> None:
    stream = [BYTES.separator_id, *BYTES.encode(document), BYTES.separator_id, *BYTES.encode("Another document")]
    assert opening_words(BYTES, np.array(stream)) == words


def test_a_character_that_is_cut_is_left_out() -> None:
    """The 256 bytes that are looked at end inside the last character."""
    document = "aa " + "語" * 85  # 3 + 255 bytes
    stream = [BYTES.separator_id, *BYTES.encode(document)]
    assert "\ufffd" not in opening_words(BYTES, np.array(stream))


def test_openings_of_different_documents_each_once() -> None:
    documents = [
        "Once upon a time, a dragon",
        "",
        "Once upon a time, a cat",
        "ROMEO:\nBut",
        "One sunny day, Tom",
        "Last",
    ]
    stream = [token for text in documents for token in (BYTES.separator_id, *BYTES.encode(text))]
    assert openings(BYTES, np.array(stream), 3) == ["Once upon a time,", "ROMEO:", "One sunny day, Tom"]
    assert openings(BYTES, np.array(stream[:1]), 3) == []
