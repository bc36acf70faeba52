"""The token store: what lies in it, when it is built again, and what an interruption leaves."""

import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from moe_jax.config import DataConfig, UserError
from moe_jax.data import store_draft, streams, token_store
from moe_jax.data.streams import stored_documents, token_stream
from moe_jax.data.text_files import SEPARATOR
from moe_jax.data.token_store import open_store, prepare_token_store
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer
from moe_jax.system import files

TRAIN = ["Once upon a time there was a fox.", "The fox was old.\nIt ate.", "Grün 😀"]
VALID = ["A hen sat.", "It slept."]


def write_folder(folder: Path, train=TRAIN, valid=VALID) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(f"\n{SEPARATOR}\n".join(train), encoding="utf-8")
    (folder / "valid.txt").write_text(f"\n{SEPARATOR}\n".join(valid), encoding="utf-8")
    return str(folder)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    return DataConfig(source=write_folder(tmp_path / "text"), tokenizer="byte")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob("*.partial"))


def forbid_building(*_):
    raise AssertionError("built again")


def test_the_streams_are_separator_document_separator(data, cache):
    store = prepare_token_store(data, cache=cache, progress=False)
    for split, documents in ((store.train, TRAIN), (store.valid, VALID)):
        expected = [256] + [token for document in documents for token in (*document.encode(), 256)]
        assert split.tokens[:].tolist() == expected
        assert split.tokens.dtype == np.uint16
        assert isinstance(split.tokens[:], np.memmap)
        assert (split.documents, split.bytes) == (
            len(documents),
            sum(len(document.encode()) for document in documents),
        )
    assert store.source == data.source
    assert open_store(store.folder).digest == store.digest


def test_documents_across_batches_stay_in_order(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(streams, "_BATCH_BYTES", 40)
    stories = [f"{i} " * (i % 7 + 1) + "end" for i in range(50)]
    source = write_folder(tmp_path / "many", stories)
    store = prepare_token_store(DataConfig(source=source, tokenizer="bpe", vocab_size=270), cache=cache, progress=False)
    text = store.tokenizer.decode(store.train.tokens[:])
    assert text == SEPARATOR + "".join(story + SEPARATOR for story in stories)
    assert store.train.documents == 50


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_type_holds_the_separator(vocab_size, dtype, data, cache):
    """Vocabularies of pairs of bytes, on either side of what uint16 holds."""
    merges = [[i // 256, i % 256] for i in range(vocab_size - 257)]
    values = {"kind": "bpe", "merges": merges}
    tokenizer = Tokenizer.from_dict({**values, "digest": token_store._digest(values)})
    store = prepare_token_store(data, tokenizer=tokenizer, cache=cache, progress=False)
    assert store.train.tokens.dtype == dtype
    assert store.train.tokens[0] == store.train.tokens[-1] == vocab_size - 1
    assert store.tokenizer.decode(store.valid.tokens[1:-1]) == f"{VALID[0]}{SEPARATOR}{VALID[1]}"


def test_a_store_is_built_once(tmp_path, cache, monkeypatch):
    """Also for the same text elsewhere, and for a given tokenizer that is equal; nor is one trained again."""
    first = prepare_token_store(
        DataConfig(source=write_folder(tmp_path / "a"), vocab_size=260), cache=cache, progress=False
    )
    monkeypatch.setattr(token_store, "_build", forbid_building)
    monkeypatch.setattr(token_store, "train_tokenizer", forbid_building)
    elsewhere = DataConfig(source=write_folder(tmp_path / "b"), vocab_size=260)
    assert prepare_token_store(elsewhere, cache=cache, progress=False).digest == first.digest
    other_settings = DataConfig(source=elsewhere.source, tokenizer="byte")
    assert (
        prepare_token_store(other_settings, tokenizer=first.tokenizer, cache=cache, progress=False).folder
        == first.folder
    )


def test_the_digest_is_of_the_data_and_not_of_where_it_lies(tmp_path):
    here, there = (
        prepare_token_store(
            DataConfig(source=write_folder(tmp_path / name)), cache=tmp_path / f"{name}-cache", progress=False
        )
        for name in ("here", "there")
    )
    assert here.digest == there.digest
    assert here.source != there.source


def test_another_text_or_tokenizer_is_another_store(tmp_path, data, cache):
    stores = [
        prepare_token_store(data, cache=cache, progress=False),
        prepare_token_store(DataConfig(source=data.source, vocab_size=258), cache=cache, progress=False),
        prepare_token_store(DataConfig(source=data.source, vocab_size=259), cache=cache, progress=False),
    ]
    write_folder(Path(data.source), valid=[*VALID, "New."])
    stores.append(prepare_token_store(data, cache=cache, progress=False))
    assert stores[-1].valid.documents == 3
    assert len({store.digest for store in stores}) == len({store.folder for store in stores}) == 4


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[7] ^= 1
    (folder / "train.bin").write_bytes(content)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "valid.bin", 10)


def change_the_tokenizer(folder: Path) -> None:
    values = {"kind": "bpe", "merges": [[97, 98]]}
    (folder / "tokenizer.json").write_text(json.dumps({**values, "digest": token_store._digest(values)}))


def change_the_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        cut_short,
        change_the_tokenizer,
        change_the_format,
        lambda folder: (folder / "train.bin").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
    ],
)
def test_a_damaged_store_is_refused_and_built_again(damage, data, cache):
    first = prepare_token_store(data, cache=cache, progress=False)
    damage(first.folder)
    with pytest.raises(UserError, match=r"prepare the data again|prepared again"):
        open_store(first.folder)
    assert prepare_token_store(data, cache=cache, progress=False).digest == first.digest
    assert open_store(first.folder).digest == first.digest


PREPARE = """
import os, signal, sys
from pathlib import Path
from moe_jax.config import DataConfig
from moe_jax.data import store_draft, token_store
from moe_jax.system import files
{0}
print(token_store.prepare_token_store(DataConfig(source=sys.argv[1], tokenizer="byte"), cache=Path(sys.argv[2])).digest)
"""


def start(data: DataConfig, cache: Path, patch: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE.format(patch), data.source, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(files.fcntl is None, reason="without flock a leftover of another process is not touched")
def test_a_killed_build_leaves_no_store_and_the_next_one_cleans_up(data, cache):
    """Killed when the training stream is written and not yet on the disk."""
    killed = start(data, cache, "store_draft.to_disk = lambda file: os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate()
    assert killed.returncode == -9
    (draft,) = leftovers(cache)
    (half_written,) = draft.glob("*.draft")
    assert half_written.name.startswith(".train.00000.bin.")
    store = prepare_token_store(data, cache=cache, progress=False)
    assert store.train.documents == 3
    assert leftovers(cache) == []


KILLED_AT_A_WRITE = """
true, left = os.fsync, {0}
def fsync(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    true(descriptor)
os.fsync = fsync
"""


@pytest.mark.skipif(files.fcntl is None, reason="without flock a build does not go on in the draft of another")
def test_a_build_killed_at_any_write_leaves_no_file_in_the_store(data, tmp_path):
    """Killed before the first file is brought to the disk, before the second, and so on. Names of drafts begin with a
    dot."""
    whole = prepare_token_store(data, cache=tmp_path / "whole", progress=False)
    expected = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    for write in itertools.count(1):
        (cache := tmp_path / str(write)).mkdir()
        killed = start(data, cache, KILLED_AT_A_WRITE.format(write))
        _, said = killed.communicate()
        if killed.returncode == 0:
            break
        assert killed.returncode == -9, said
        store = prepare_token_store(data, cache=cache, progress=False)
        assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == expected, write
    assert write > 6, "tokenizer, two streams with their entries, index"


@pytest.mark.parametrize("patch", ["", "files.fcntl = None"], ids=["lock", "no lock"])
def test_builds_at_once_agree(data, cache, patch):
    builds = [start(data, cache, patch) for _ in range(3)]
    digests = {build.communicate()[0] for build in builds}
    assert digests == {prepare_token_store(data, cache=cache, progress=False).digest + "\n"}
    assert leftovers(cache) == []


def test_a_build_that_was_overtaken_uses_the_store_of_the_other(data, cache, monkeypatch):
    """Without a lock, another process finishes while this one is still writing."""
    build = token_store._build

    def overtaken(*args):
        monkeypatch.setattr(token_store, "_build", build)
        prepare_token_store(data, cache=cache, progress=False)
        build(*args)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(token_store, "_build", overtaken)
    assert prepare_token_store(data, cache=cache, progress=False).train.documents == 3
    assert leftovers(cache) == []


def test_a_build_that_stops_leaves_nothing(data, cache, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_draft, "to_disk", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_token_store(data, cache=cache, progress=False)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "cannot be written .the disk is full"),
        (errno.EFBIG, "cannot be written .a file is larger than `ulimit -f` allows"),
        (errno.EROFS, "cannot be written .Read-only"),
    ],
)
def test_a_disk_that_takes_no_more_is_said_in_one_line(code, words, data, cache, monkeypatch):
    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match=f"{cache}: {words}.*MOE_JAX_CACHE"):
        prepare_token_store(data, cache=cache, progress=False)
    assert leftovers(cache) == []


def test_a_cache_that_is_a_file_is_said_in_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MOE_JAX_CACHE"):
        prepare_token_store(data, cache=tmp_path / "file", progress=False)


@pytest.mark.parametrize("step", ["_build_split", "train_tokenizer"])
def test_a_text_edited_while_it_is_read_is_not_kept(step, tmp_path, cache, monkeypatch):
    """Edited before it is read and restored after: what was made of it is not the text that its digest names."""
    source = write_folder(tmp_path / "text", ["the fox and the fox and the fox"], ["the hen and the hen"])
    file, true = tmp_path / "text" / "train.txt", getattr(token_store, step)
    data = DataConfig(source=source, tokenizer="bpe", vocab_size=270)
    expected = prepare_token_store(data, cache=tmp_path / "other", progress=False)

    def while_edited(*arguments, **options):
        whole = file.read_text()
        file.write_text(whole.replace("fox", "cat"))
        try:
            return true(*arguments, **options)
        finally:
            file.write_text(whole)

    with monkeypatch.context() as patch:
        patch.setattr(token_store, step, while_edited)
        with pytest.raises(UserError, match="the text was changed while it was read; start again"):
            prepare_token_store(data, cache=cache, progress=False)
    assert leftovers(cache) == []
    store = prepare_token_store(data, cache=cache, progress=False)
    assert (store.digest, store.tokenizer.digest) == (expected.digest, expected.tokenizer.digest)


def test_a_text_shorter_than_a_context_is_refused(data, cache):
    tokens = sum(len(story.encode()) + 1 for story in TRAIN) + 1
    prepare_token_store(data, cache=cache, progress=False, seq_len=tokens - 1)
    with pytest.raises(UserError, match=f"{tokens} training tokens.*--seq-len {tokens} needs {tokens + 1}"):
        prepare_token_store(data, cache=cache, progress=False, seq_len=tokens)


def test_an_empty_split_leaves_nothing(tmp_path, cache):
    source = write_folder(tmp_path / "empty", valid=[" "])
    with pytest.raises(UserError, match=r"valid\.txt.*there is no text in it"):
        prepare_token_store(DataConfig(source=source, tokenizer="byte"), cache=cache, progress=False)
    assert leftovers(cache) == []


def test_the_cache_folder_can_be_set(data, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "elsewhere"))
    assert prepare_token_store(data, progress=False).folder.parent == tmp_path / "elsewhere"
    monkeypatch.delenv("MOE_JAX_CACHE")
    assert files.cache_dir().name == "moe-jax"


def test_progress_is_lines_without_a_terminal_and_nothing_where_it_is_not_wanted(data, cache, capsys):
    prepare_token_store(data, cache=cache)
    train, valid = capsys.readouterr().err.splitlines()
    assert "train: 3 documents" in train
    assert "valid: 2 documents" in valid
    shutil.rmtree(cache)
    prepare_token_store(data, cache=cache, progress=False)
    assert capsys.readouterr() == ("", "")


def test_learning_a_tokenizer_shows_progress(tmp_path, cache, capsys):
    source = write_folder(tmp_path / "text")
    prepare_token_store(DataConfig(source=source, tokenizer="bpe", vocab_size=300), cache=cache)
    begun, learned, *_ = capsys.readouterr().err.splitlines()
    assert begun == "learning a tokenizer of 300 entries ..."
    assert "learning the tokenizer: 3 documents" in learned


def test_progress_is_a_bar_on_a_terminal(data, cache, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    prepare_token_store(data, cache=cache)
    shown = sys.stderr.getvalue()
    assert "\x1b[" in shown
    assert "3 documents" in shown


def test_building_takes_bounded_memory(tmp_path, cache):
    """16 MiB of text, whose stream of uint16 is 32 MiB."""
    source = write_folder(tmp_path / "big", ["x " * 512] * 16_384)
    tracemalloc.start()
    store = prepare_token_store(DataConfig(source=source, tokenizer="byte"), cache=cache, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.train.bytes == 1023 * 16_384
    assert peak < 16e6


def test_tinystories(cache, monkeypatch):
    """The real validation file: 76,627 GPT-2 tokens, and a separator around each of 399 stories."""
    shared = os.environ.get("MOE_JAX_SHARED")
    if not shared:
        pytest.skip("MOE_JAX_SHARED names no folder with the GPT-2 vocabulary and TinyStories")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(shared, "data", "tiktoken_cache")))
    source = str(Path(shared, "data", "tinystories"))
    store = prepare_token_store(DataConfig(source=source, tokenizer="gpt2"), cache=cache, progress=False, seq_len=256)
    assert (store.train.documents, store.valid.documents) == (11_146, 399)
    assert len(store.valid.tokens) == 76_627 + 400
    assert store.valid.bytes + 399 * len(f"\n{SEPARATOR}\n") == 325_383


@pytest.mark.parametrize("block", [1, 2, 7, 10**6])
def test_the_documents_of_a_stream_are_given_back(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_READ_TOKENS", block)
    tokenizer = train_tokenizer(DataConfig(tokenizer="byte"), None)  # pyright: ignore[reportArgumentType]
    documents = ["One.", "é 日本", "Three"]
    stream = token_stream(iter(documents), tokenizer).tokens
    assert list(stored_documents(stream, tokenizer)) == documents
    assert list(stored_documents(stream[:-1], tokenizer)) == documents[:2]  # the last one is cut
    assert list(stored_documents(stream[:0], tokenizer)) == []
