"""Tokenizers: lossless, the same ids for the same text, and no harm from a bad file."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, UserError
from moe_jax.data import tokenizers
from moe_jax.data.documents import SEPARATOR
from moe_jax.data.tokenizers import StreamDecoder, Tokenizer, load_tokenizer, token_pieces, train_tokenizer

TALES = [
    f"The {a} cat saw the {b} dog and they played all day.\n"
    for a in ("big", "red", "old", "shy")
    for b in ("wet", "sad")
]


def trained(vocab_size: int, documents=TALES) -> Tokenizer:
    return train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=vocab_size), documents)


BPE = trained(290)
BYTE = train_tokenizer(DataConfig(tokenizer="byte"))
both = pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])


@pytest.fixture(scope="module")
def gpt2():
    shared = os.environ.get("MOE_JAX_SHARED")
    if not shared:
        pytest.skip("MOE_JAX_SHARED names no folder with the GPT-2 vocabulary and TinyStories")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(Path(shared, "data", "tiktoken_cache")))
        return train_tokenizer(DataConfig(tokenizer="gpt2"))


texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the cat"))) | st.sampled_from(
    [SEPARATOR, f"a{SEPARATOR}b", "\r\n\t  \n ", "e\u0301\u200d\U0001f469\u200d\U0001f680", "\0\x7f"]
)


@both
@settings(deadline=None)
@given(text=texts)
def test_every_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.separator_id for i in ids)
    assert list(tokenizer.encode_batch([text, "x", text])[2]) == ids


def test_the_sizes():
    assert (BYTE.vocab_size, BYTE.separator_id) == (257, 256)
    assert (BPE.vocab_size, BPE.separator_id) == (290, 289)
    assert trained(257).vocab_size == 257  # no merge at all
    assert 257 < trained(5000).vocab_size < 5000  # a small corpus has no more to merge
    assert BPE.token_bytes().dtype == np.int32
    assert BPE.token_bytes().shape == (290,)


@both
def test_the_separator_has_no_bytes_and_shows_when_decoded(tokenizer):
    assert tokenizer.token_bytes()[tokenizer.separator_id] == 0
    ids = [*tokenizer.encode("One."), tokenizer.separator_id, *tokenizer.encode("Two.")]
    assert tokenizer.decode(ids).split(SEPARATOR) == ["One.", "Two."]


def test_gpt2_is_gpt2(gpt2):
    """Its size, two ids that everybody knows, and the count of TinyStories' validation file."""
    assert (gpt2.kind, gpt2.vocab_size, gpt2.separator_id) == ("gpt2", 50_257, 50_256)
    assert gpt2.encode("Hello world") == [15_496, 995]
    text = Path(os.environ["MOE_JAX_SHARED"], "data", "tinystories", "valid.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split(SEPARATOR) if story.strip()]
    assert sum(map(len, gpt2.encode_batch(stories))) == 76_627
    assert set(gpt2.to_dict()) == {"kind", "vocab_size", "digest"}


def slow_encode(merges: list[list[int]], text: str) -> list[int]:
    """Byte-level BPE by its definition, for lower-case words: over and over the earliest merge that fits."""
    merged = {tuple(pair): 256 + i for i, pair in enumerate(merges)}
    ids = []
    for word in re.findall(r" ?[a-z]+", text):
        parts = list(word.encode())
        while fitting := [pair for pair in pairwise(parts) if pair in merged]:
            best = min(fitting, key=merged.__getitem__)
            at = next(i for i, pair in enumerate(pairwise(parts)) if pair == best)
            parts[at : at + 2] = [merged[best]]
        ids += parts
    return ids


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["the", "then", "cat", "dog", "played", "seed", "bigger"]), max_size=8))
def test_encoding_applies_the_merges_in_order(words):
    text = " ".join(words)
    assert BPE.encode(text) == slow_encode(BPE.to_dict()["merges"], text)


def test_training_is_deterministic():
    assert {trained(290).digest for _ in range(5)} == {BPE.digest}
    assert trained(289).digest != BPE.digest
    assert trained(290, TALES[1:]).digest != BPE.digest


def signed(definition: Any) -> Any:
    """With the digest that belongs to it, as someone who means harm would write it."""
    return {"digest": tokenizers.json_digest(definition), **definition} if isinstance(definition, dict) else definition


@pytest.mark.parametrize(
    "definition",
    [
        [],
        {"kind": "pickle"},
        {"kind": "bpe"},
        {"kind": "hf"},
        {"kind": "bpe", "merges": [[97, 256]]},
        {"kind": "byte", "digest": "that of another definition"},
    ],
    ids=lambda definition: str(definition)[:40],
)
def test_a_bad_file_is_a_user_error_of_one_line(definition, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(signed(definition)))
    with pytest.raises(UserError, match=re.escape(str(path)) + r": .*tokenizer.*; .+\Z"):
        load_tokenizer(path)


@both
def test_a_saved_tokenizer_is_the_same_again(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert (again.kind, again.vocab_size, again.digest) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.digest)
    text = f"The shy cat, größer als 😀 {SEPARATOR}"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.to_dict() == tokenizer.to_dict() == json.loads(path.read_text())


@both
@pytest.mark.parametrize("beyond", [0, 5, -(10**6), None])
def test_an_unknown_id_is_a_user_error(tokenizer, beyond):
    unknown = -1 if beyond is None else tokenizer.vocab_size + beyond
    tokenizer.decode([0, tokenizer.vocab_size - 1])
    with pytest.raises(UserError, match=f"token id {unknown} is outside the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([97, unknown])


def test_text_that_is_not_unicode_is_a_user_error():
    """What Python makes of a prompt whose bytes are not UTF-8."""
    with pytest.raises(UserError, match="not UTF-8 at character 3"):
        BPE.encode("caf\udce9")


@both
@settings(deadline=None)
@given(data=st.data())
def test_a_stream_is_the_text_piece_by_piece(tokenizer, data):
    """For any ids, whole characters or not."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    decoder = StreamDecoder(tokenizer)
    assert "".join([*map(decoder.feed, ids), decoder.finish()]) == tokenizer.decode(ids)


def test_a_long_word_is_learned_in_pieces() -> None:
    """A genome has no spaces. Learning takes time quadratic in the length of a word, so a word counts as several."""
    genome = "".join(np.random.default_rng(0).choice(list("ACGT"), 10_000))
    pieces = [genome[i : i + 512] for i in range(0, len(genome), 512)]
    assert tokenizers._learn_merges([genome], 400) == tokenizers._learn_merges(pieces, 400)


def test_pieces_show_bytes_that_are_no_character() -> None:
    ids = np.array([*BYTE.encode("aé"), BYTE.separator_id])
    assert token_pieces(BYTE, ids) == ["a", "<C3>", "<A9>", SEPARATOR]
    pair = Tokenizer({"kind": "bpe", "merges": [[0xC3, 0xA9], [0xF0, 0x9F]]})
    assert token_pieces(pair, np.array([256, 257])) == ["é", "<F0 9F>"]
