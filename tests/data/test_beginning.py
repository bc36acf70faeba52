"""What is wrong with a text is said at once, with status 2, as far as its beginning shows."""

import json
from pathlib import Path

import pytest

from moe_jax.config import ConfigError, DataConfig
from moe_jax.config.data import DataFormat
from moe_jax.data import beginning
from moe_jax.data.beginning import check_beginning

ROW = json.dumps({"text": "a story of a cat"}) + "\n"
CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
LATIN = "A caf\u00e9. ".encode("latin-1")


def check(path: Path, seq_len: int = 4, form: DataFormat = "text") -> None:
    check_beginning(DataConfig(source=str(path), format=form), seq_len)


@pytest.mark.parametrize(
    ("name", "content", "form", "said"),
    [
        ("a.txt", b"", "text", "there is no text in it; give a longer one"),
        ("a.txt", b"\xef\xbb\xbf \n\n", "text", "there is no text in it"),
        ("a.txt", b"\n<|endoftext|>\n<|endoftext|>", "text", "there is no text in it"),
        ("a.jsonl", b"\n\n", "text", "there is no text in it"),
        (
            "a.txt",
            b"Fine. " + LATIN,
            "text",
            r"not UTF-8 at byte 11 .*`iconv -f WINDOWS-1252 -t UTF-8 a\.txt > a-utf8\.txt`",
        ),
        ("a.jsonl", (ROW * 2 + '{"text": \n' + ROW).encode(), "text", "line 3 is not JSON"),
        ("a.jsonl", (ROW * 4 + CHAT).encode(), "text", r"line 5 holds `messages`.*`uv run python -m moe_jax sft`"),
        ("a.jsonl", (CHAT * 2 + ROW).encode(), "chat", "line 3 has no list `messages`"),
        ("a.jsonl", (CHAT + "x").encode(), "chat", "line 2 is not JSON"),
    ],
)
def test_what_its_beginning_shows(name: str, content: bytes, form: DataFormat, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--data {path}: {said}"):
        check(path, form=form)


def test_only_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character and a row that the end of the beginning cuts are no mistakes. What follows is found later."""
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes("caf\u00e9 ".encode() * 5 + LATIN)
    rows.write_text(ROW * 3 + "no row\n")
    for most in range(1, 30):
        monkeypatch.setattr(beginning, "LOOKED_AT", most)
        check(text)
        check(rows)
    monkeypatch.setattr(beginning, "LOOKED_AT", 50)
    with pytest.raises(ConfigError, match="not UTF-8 at byte 35 "):
        check(text)


def test_all_files_of_a_folder_share_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file among others is no mistake."""
    for name, content in (("a.txt", b"a text"), ("b.txt", b""), ("c.txt", LATIN[5:])):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.txt: not UTF-8"):
        check(tmp_path)
    monkeypatch.setattr(beginning, "LOOKED_AT", 6)
    check(tmp_path)
    (tmp_path / "c.txt").unlink()
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"^--data {tmp_path}: there is no text in it"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["valid.txt", "valid.jsonl"])
def test_a_validation_text_after_a_long_training_text_is_not_called_empty(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training text alone has the bytes that are looked at."""
    (tmp_path / "train.txt").write_text("a text of 20 bytes. ")
    (tmp_path / name).write_text(ROW if name.endswith("jsonl") else "\n\nA hen.")
    for most in (19, 20, 21, 22, 10**6):
        monkeypatch.setattr(beginning, "LOOKED_AT", most)
        check(tmp_path)
    (tmp_path / name).write_text("\n\n")
    with pytest.raises(ConfigError, match=f"{name}: there is no text in it"):
        check(tmp_path)


@pytest.mark.parametrize(("size", "fits"), [(255, True), (254, False)])
def test_a_text_shorter_than_a_context(size: int, fits: bool, tmp_path: Path) -> None:
    """A byte is a token at least, with a separator before and behind: 255 bytes are 257 tokens, and a context of 256
    needs one token more than it has."""
    path = tmp_path / "a.txt"
    path.write_text("a" * size)
    if fits:
        check(path, 256)
        return
    with pytest.raises(ConfigError, match="254 bytes to train on, and a context of --seq-len 256 needs 257 tokens"):
        check(path, 256)


def test_a_corpus_with_a_name_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(Path("stories"))
