"""The user's own files: folders, JSON lines, and what validates."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.config import ConfigError, DataConfig, UserError
from moe_jax.data import json_lines, text_files
from moe_jax.data.corpora import check_source, open_corpus, scored_documents
from moe_jax.data.text_files import SEPARATOR


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))


def both(source: Path) -> tuple[list[str], list[str]]:
    corpus = open_corpus(DataConfig(source=str(source)))
    return list(corpus.documents("train")), list(corpus.documents("valid"))


def fingerprint(source: Path) -> str:
    return open_corpus(DataConfig(source=str(source))).fingerprint()


def test_a_folder_has_its_files_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.txt").write_text(SEPARATOR.join(f"two {i}" for i in range(10)))
    (tmp_path / "a.jsonl").write_text(rows(*(f"one {i}" for i in range(10))))
    (tmp_path / "c.TXT").write_text(SEPARATOR.join(f"three {i}" for i in range(20)))
    for name in ("notes.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).write_text("no text of the corpus")
    train, valid = both(tmp_path)
    whole = [*(f"one {i}" for i in range(10)), *(f"two {i}" for i in range(10)), *(f"three {i}" for i in range(20))]
    assert (train, valid) == (whole[:38], whole[38:])  # 5 % of 40 documents


def test_a_folder_of_books_validates_on_the_last(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"The book {name}. " * 10)
    train, valid = both(tmp_path)
    assert [text[:10] for text in (*train, *valid)] == ["The book a", "The book b", "The book c"]
    assert len(valid) == 1


def test_a_folder_without_validation_text_is_split(tmp_path):
    (tmp_path / "train.txt").write_text(SEPARATOR.join(f"story {i}" for i in range(100)))
    (tmp_path / "other.txt").write_text("not asked for")
    train, valid = both(tmp_path)
    assert (len(train), valid) == (95, [f"story {i}" for i in range(95, 100)])
    (tmp_path / "valid.jsonl").write_text(rows("the validation text"))
    train, valid = both(tmp_path)
    assert (len(train), valid) == (100, ["the validation text"])


@given(
    texts=st.lists(st.text(st.sampled_from('a é😀\n\r"\\<|endoftext|>'), max_size=20), min_size=2, max_size=30).filter(
        lambda texts: sum(bool(t.strip()) for t in texts) >= 2 and bool(texts[-1].strip())
    ),
    chunk=st.integers(1, 64),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_json_are_documents(tmp_path, texts, chunk):
    """However the reads fall. A separator in a row is text: the key is what ends a document."""
    file = tmp_path / "rows.jsonl"
    file.write_text(rows(*texts).replace("\n", "\n\n", 3), encoding="utf-8")
    with patch.object(text_files, "_CHUNK", chunk):
        train, valid = both(file)
    assert train + valid == [text.strip() for text in texts if text.strip()]
    held_out = max(1, len(texts) // 20)
    assert valid == [text.strip() for text in texts[-held_out:] if text.strip()]


def test_a_long_row_is_cut(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(rows("word " * 100, "the end"))
    with patch.object(text_files, "_LONGEST", 100):
        train, _ = both(file)
    assert len(train) > 3
    assert " ".join(train) == ("word " * 100).strip()


BAD_ROWS = {
    "conversation": ('{"messages": [{"role": "user", "content": "Hi"}]}', "holds `messages`, a conversation"),
    "no text": ('{"story": "x", "id": 1}', r"no key `text` that holds a text \(its keys: story, id\)"),
    "text is a number": ('{"text": 3}', "no key `text` that holds a text"),
    "empty object": ("{}", r"\(its keys: none\)"),
    "list": ('["a"]', "each line must be an object"),
    "cut": ('{"text": "a', "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "huge number": ('{"n": ' + "9" * 5000 + "}", "is not JSON"),
    "half a pair": ('{"text": "\\ud800"}', "half a surrogate pair"),
}


@pytest.mark.parametrize("first", [True, False], ids=["first row", "later row"])
@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_without_text_is_said_in_one_line(tmp_path, row, said, first):
    """The first row is looked at before jax is imported, with status 2; the others when they are read."""
    file = tmp_path / "rows.jsonl"
    good = rows("a story")
    file.write_text((row + "\n" + good * 3) if first else (good * 2 + row + "\n" + good))
    if first:
        with pytest.raises(ConfigError, match=f"--data {file}: its first row .*{said}"):
            check_source(str(file))
        return
    check_source(str(file))
    with pytest.raises(UserError, match=said) as failure:
        both(file)
    assert f"{file}: line 3 " in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_line_without_end_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(rows("a", "b" * 200))
    with (
        patch.object(json_lines, "LONGEST_LINE", 100),
        patch.object(text_files, "_CHUNK", 50),
        pytest.raises(UserError, match="longer than"),
    ):
        both(file)


def test_one_row_cannot_be_split(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(rows("a story"))
    with pytest.raises(UserError, match="has fewer than two rows, and one must be left for validation; add rows"):
        both(file)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ConfigError, match=r"must hold \.txt or \.jsonl files; there is none"):
        check_source(str(tmp_path))


def test_what_a_file_is_decides_not_only_its_bytes(tmp_path):
    """The same bytes, another split or another kind of file: another corpus."""
    for name, (train, valid) in {"a": ((1, 2), (3,)), "b": ((1,), (2, 3))}.items():
        for number in (*train, *valid):
            split = tmp_path / name / ("1" if number in train else "2")
            split.mkdir(parents=True, exist_ok=True)
            (split / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "x.txt").write_text(rows("a", "b"))
    (tmp_path / "x.jsonl").write_text(rows("a", "b"))
    assert fingerprint(tmp_path / "x.txt") != fingerprint(tmp_path / "x.jsonl")
    corpus = open_corpus(DataConfig(source=str(tmp_path / "a")))
    moved = type(corpus)(
        "a", {"train": corpus.spans["train"][:1], "valid": corpus.spans["train"][1:] + corpus.spans["valid"]}
    )
    assert moved.fingerprint() != corpus.fingerprint()


def test_a_file_is_scored_whole_and_a_folder_by_its_validation_part(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(rows(*(f"story {i}" for i in range(40))))
    assert list(scored_documents(str(file))) == [f"story {i}" for i in range(40)]
    assert list(scored_documents(str(tmp_path))) == ["story 38", "story 39"]
