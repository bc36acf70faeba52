"""Imported tokenizers: the ids of the library, the bytes of each id, and a separator that no text can forge."""

import functools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, UserError
from moe_jax.data.chats import answer_prompt, encode_chats
from moe_jax.data.documents import SEPARATOR, Message
from moe_jax.data.token_store import open_store, prepare_token_store, stored_documents
from moe_jax.data.tokenizers import Tokenizer, imported_tokenizer, load_tokenizer
from tests.support.hf_tokenizers import BYTE_LEVEL, END, KINDS, end_of, made

made = functools.cache(made)
PIECES = [
    END,
    "<|im_start|>",
    "<|end",
    "oftext|>",
    " the",
    "dragon",
    "'ll",
    "    ",
    "\n\n",
    "1234",
    "e\u0301",
    "\u2581",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@functools.cache
def opened(kind: str) -> Tokenizer:
    return imported_tokenizer(made(kind), "", end_of(made(kind)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=TEXTS)
@example(text="")
@example(text=f"a{END}b<|im_start|>c")
def test_the_entries_of_the_ids_are_the_text(kind: str, text: str) -> None:
    """Special tokens in it too. Qwen's composes characters first; the kinds with spaces as a mark put one before it."""
    tokenizer = opened(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.separator_id not in ids
    expected = unicodedata.normalize("NFC", text) if kind == "qwen" else text
    found = tokenizer.decode(ids)
    if kind not in BYTE_LEVEL:
        expected = expected.replace("\u2581", " ")
        found = found.removeprefix(" ") if not expected.startswith(" ") else found
        assert found in (expected, " " + expected)
    else:
        assert found == expected
    assert tokenizer.token_bytes()[ids].sum() == len(tokenizer.decode_bytes(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_the_separator_has_no_bytes_and_lies_anywhere(kind: str) -> None:
    tokenizer = opened(kind)
    assert tokenizer.separator_id == end_of(made(kind)) < tokenizer.vocab_size - 1
    assert tokenizer.token_bytes()[tokenizer.separator_id] == 0
    assert tokenizer.decode([tokenizer.separator_id]) == SEPARATOR


def test_it_is_saved_unchanged_and_bound_by_its_digest(tmp_path: Path) -> None:
    first = opened("smollm")
    first.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.digest, again.kind, again.separator_id) == (first.digest, "hf", first.separator_id)
    assert again.to_dict()["file"] == made("smollm")
    assert again.encode("a dragon") == first.encode("a dragon")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    for change in ({"separator": 3}, {"file": made("gpt2")}, {"settings": "{}"}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match="its digest does not match"):
            load_tokenizer(tmp_path / "tokenizer.json")


def test_a_text_that_gives_the_separator_is_refused() -> None:
    """A hostile vocabulary in which the separator is an ordinary word. A document cannot end another one."""
    values = json.loads(made("gpt2"))
    word = values["model"]["vocab"]["d"]
    tokenizer = imported_tokenizer(json.dumps(values), "", word)
    with pytest.raises(UserError, match=f"reads a part of the text 'd' as token {word}, which ends texts"):
        tokenizer.encode("d")
    assert tokenizer.encode("a a")


def test_documents_are_stored_and_come_back(tmp_path: Path) -> None:
    """A vocabulary of which the model's separator is the first id, and a text with the separator's spelling."""
    texts = [f"Once a dragon ate {i} cakes. <|im_start|>" for i in range(60)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(texts))
    data = DataConfig(source=str(tmp_path / "text.txt"), tokenizer="hf")
    store = prepare_token_store(data, tokenizer=opened("llama3"), cache=tmp_path / "cache", progress=False)
    found = [
        document
        for split in (store.train, store.valid)
        for document in stored_documents(split.tokens, opened("llama3"))
    ]
    assert found == texts
    sizes = opened("llama3").token_bytes()
    assert store.valid.bytes == sizes[np.asarray(store.valid.tokens)].sum()
    assert open_store(store.folder).digest == store.digest


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(content=TEXTS.map(str.strip).filter(bool))
@example(content="Hello")
def test_a_turn_is_cut_as_one_text(kind: str, content: str) -> None:
    """As a chat template writes it elsewhere: the role, a line end, the content. The content is what is learned."""
    tokenizer = opened(kind)
    found = encode_chats(tokenizer, [(Message("assistant", content),)])[0]
    assert found.tokens.tolist() == [*tokenizer.encode(f"assistant\n{content}"), tokenizer.separator_id]
    head = tokenizer.encode("assistant\n")
    assert found.tokens[: len(head)].tolist() == head == answer_prompt(tokenizer, [])[1:]
    assert np.flatnonzero(~found.answers).tolist() == list(range(len(head)))
