"""A store in shards: the same ids and digests as one file, resumed, made side by side, and mended shard by shard."""

import errno
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.config import DataConfig, UserError
from moe_jax.data import file_corpus, shard_workers, shards, store_draft, text_files, text_notes, text_plan, token_store
from moe_jax.data.batches import evaluation_windows, text_bytes, train_positions, validation_subset
from moe_jax.data.opening import openings
from moe_jax.data.store_draft import Draft
from moe_jax.data.streams import stored_documents
from moe_jax.data.synthetic.chats import write_chats
from moe_jax.data.text_files import SEPARATOR
from moe_jax.data.token_store import TokenStore, open_store, prepare_token_store

PART = 300
KINDS = {"byte": PART, "bpe": PART, "chat": 2000, "stories": 20_000}
"""Kind of text -> the size of its parts."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_plan, "PART_BYTES", PART)
    monkeypatch.setattr(shard_workers, "usable_cores", lambda: 1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(text_plan, "PART_BYTES", KINDS[request.param])
    return request.param


def documents(count: int = 60) -> list[str]:
    return [f"Story {i}: " + "once upon a time é😀 " * (i % 5) + "the end." for i in range(count)]


def data_of(kind: str, folder: Path) -> DataConfig:
    if kind == "stories":
        return DataConfig(source="stories", stories=200, tokenizer="byte")
    if kind == "chat":
        write_chats(folder / "chats.jsonl", 60)
        return DataConfig(source=str(folder / "chats.jsonl"), tokenizer="byte", format="chat")
    (folder / "text.txt").write_text(SEPARATOR.join(documents()), encoding="utf-8")
    return DataConfig(source=str(folder / "text.txt"), tokenizer="bpe" if kind == "bpe" else "byte", vocab_size=280)


def prepare(data: DataConfig, cache: Path) -> TokenStore:
    return prepare_token_store(data, cache=cache, progress=False)


def unsharded(data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    """The oracle: the whole text at once."""
    with monkeypatch.context() as patch:
        patch.setattr(text_plan, "PART_BYTES", 1 << 40)
        store = prepare(data, cache)
    assert (store.folder / "train.bin").is_file()
    return store


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bins(folder: Path, split: str = "train") -> list[str]:
    return sorted(path.name for path in folder.glob(f"{split}.*bin"))


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return data_of("byte", tmp_path)


def test_the_union_is_the_store_of_the_whole_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(kind, tmp_path)
    one, many = unsharded(data, tmp_path / "one", monkeypatch), prepare(data, tmp_path / "many")
    assert len(bins(many.folder)) > 3
    assert many.digest == one.digest
    assert many.folder.name == one.folder.name
    for a, b in ((one.train, many.train), (one.valid, many.valid)):
        assert (a.documents, a.bytes, a.digest, a.targets, a.target_bytes) == (
            *(b.documents, b.bytes, b.digest, b.targets, b.target_bytes),
        )
        np.testing.assert_array_equal(a.tokens[:], b.tokens[:])
        assert (a.answers is None) == (b.answers is None) == (kind != "chat")
        if a.answers is not None and b.answers is not None:
            np.testing.assert_array_equal(a.answers[:], b.answers[:])
    pieces = [np.fromfile(many.folder / name, "<u2") for name in bins(many.folder)]
    np.testing.assert_array_equal(np.concatenate(pieces), one.train.tokens[:])
    assert all(piece[-1] == many.tokenizer.separator_id for piece in pieces)  # whole documents


def test_the_ids_of_the_union_by_hand(data: DataConfig, tmp_path: Path) -> None:
    store = prepare(data, tmp_path / "cache")
    expected = [256] + [token for document in documents()[:57] for token in (*document.encode(), 256)]
    assert store.train.tokens[:].tolist() == expected


def test_windows_cross_the_ends_of_shards(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that reads a stream gives the same numbers as on one file."""
    one, many = unsharded(data, tmp_path / "one", monkeypatch), prepare(data, tmp_path / "many")
    count, ends = len(many.train.tokens), np.cumsum([shard.length for shard in many.train.tokens.shards])[:-1]
    crossing = 0
    for step in range(40):
        where = train_positions(count, seed=3, step=step, batch_size=4, seq_len=100).reshape(2, 2, -1)
        np.testing.assert_array_equal(one.train.tokens[where], many.train.tokens[where])
        crossing += sum(row[0] < end <= row[-1] for row in where.reshape(4, -1) for end in ends)
    assert crossing > 20
    for a, b in zip(*(evaluation_windows(s.train.tokens, seq_len=100, batch_size=5) for s in (one, many)), strict=True):
        for name in ("inputs", "targets", "start", "weights"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert list(stored_documents(many.train.tokens, many.tokenizer)) == documents()[:57]
    sizes = many.tokenizer.token_bytes()
    assert text_bytes(many.train.tokens, sizes) == many.train.bytes
    for limit in (10, 500, 10**6):
        np.testing.assert_array_equal(*(validation_subset(s.train.tokens, 256, limit) for s in (one, many)))
    assert openings(one.tokenizer, one.train.tokens, 3) == openings(many.tokenizer, many.train.tokens, 3)


def test_the_index_has_an_entry_for_each_shard(data: DataConfig, tmp_path: Path) -> None:
    store = prepare(data, tmp_path / "cache")
    train = json.loads((store.folder / "manifest.json").read_text())["splits"]["train"]
    names = [f"train.{i:05d}.bin" for i in range(len(train["shards"]))]
    assert bins(store.folder) == names
    assert sorted(content(store.folder)) == sorted([*names, "valid.bin", "manifest.json", "tokenizer.json"])
    for name, entry in zip(names, train["shards"], strict=True):
        assert shards.digest_of(store.folder / name) == entry["digest"]
        assert (store.folder / name).stat().st_size == 2 * entry["tokens"]
        assert PART < entry["bytes"] + 13 * entry["stories"] < 2 * PART or name == names[-1]
    assert [path.name for path in (tmp_path / "cache").glob("*.partial")] == []


# Several processes


@pytest.mark.parametrize("kind", ["bpe", "chat"], indirect=True)
def test_shards_made_side_by_side_have_the_same_bytes(kind: str, tmp_path: Path, monkeypatch) -> None:
    data = data_of(kind, tmp_path)
    one = prepare(data, tmp_path / "one")
    monkeypatch.setattr(shard_workers, "usable_cores", lambda: 3)
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "write", lambda *_: pytest.fail("made in this process"))
        train_only = Draft.split_entry

        def here(draft: Draft, split: str, *arguments: Any) -> Any:
            if split == "valid":
                patch.undo()
            return train_only(draft, split, *arguments)

        patch.setattr(Draft, "split_entry", here)
        three = prepare(data, tmp_path / "three")
    assert content(three.folder) == content(one.folder)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The processes that were started. None of them is left."""
    started: list[Any] = []
    true = shard_workers.subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        started.append(true(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(shard_workers.subprocess, "Popen", start)
    monkeypatch.setattr(shard_workers, "usable_cores", lambda: 2)
    yield started
    assert started
    assert all(process.poll() is not None for process in started)


def test_an_error_in_a_process_is_that_of_the_build(tmp_path: Path, workers: list[Any]) -> None:
    """The 40th document is no UTF-8. Nothing is kept: the text must be mended first."""
    text = SEPARATOR.join(documents()).encode().replace(b"Story 40", b"Story \xff")
    (tmp_path / "train.txt").write_bytes(text)
    (tmp_path / "valid.txt").write_text("A hen.")
    with pytest.raises(UserError, match=rf"train\.txt: not UTF-8 at byte {text.index(0xFF)} "):
        prepare(DataConfig(source=str(tmp_path), tokenizer="byte"), tmp_path / "cache")
    assert len(workers) == 2
    assert list((tmp_path / "cache").glob("*.partial")) == []


def test_a_process_that_is_killed_costs_no_finished_shard(
    data: DataConfig, tmp_path: Path, workers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(data, tmp_path / "expected")
    made: list[int] = []

    def kill_after_three(draft: Draft, split: str, number: int, entry: Any, sums: Any) -> Any:
        made.append(number)
        if number == 2:
            for process in workers[2:]:
                process.send_signal(signal.SIGSTOP)  # so that they are surely at work when they are killed
                process.kill()
                process.wait()
        return true(draft, split, number, entry, sums)

    true = Draft._added
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "_added", kill_after_three)
        patch.setattr(shard_workers.ShardWorkers, "_made", slowly(shard_workers.ShardWorkers._made))
        with pytest.raises(UserError, match=r"ended with status -9; start again: finished parts are kept"):
            prepare(data, tmp_path / "cache")
    (draft,) = (tmp_path / "cache").glob("*.partial")
    finished = len(list(draft.glob("train.*.json")))
    assert 3 <= finished < len(bins(expected.folder))
    assert list(draft.glob("*.tmp")) == []
    assert content(prepare(data, tmp_path / "cache").folder) == content(expected.folder)


def slowly(function: Any) -> Any:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return function(*arguments)

    return slow


def test_a_full_disk_in_a_process_is_said_in_one_line(
    data: DataConfig, tmp_path: Path, workers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files, which processes inherit, stands for the full disk."""
    resource = pytest.importorskip("resource")
    true = shard_workers.ShardWorkers._started

    def limited(self: Any) -> Any:
        process = true(self)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (400, 400))
        return process

    monkeypatch.setattr(shard_workers.ShardWorkers, "_started", limited)
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=rf"^token cache {cache}: cannot be written .a file is larger than `ulimit -f`"):
        prepare(data, cache)
    assert list(cache.glob("*.partial/*.tmp")) == []
    monkeypatch.setattr(shard_workers.ShardWorkers, "_started", true)
    assert content(prepare(data, cache).folder) == content(prepare(data, tmp_path / "expected").folder)


def test_a_disk_that_gets_full_costs_no_finished_shard(data: DataConfig, tmp_path: Path, monkeypatch) -> None:
    cache, true, calls = tmp_path / "cache", store_draft.to_disk, itertools.count()

    def full(file: Any) -> None:
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(file)

    with monkeypatch.context() as patch:
        patch.setattr(store_draft, "to_disk", full)
        with pytest.raises(UserError, match=rf"^token cache {cache}: cannot be written .the disk is full.; mend that"):
            prepare(data, cache)
    (draft,) = cache.glob("*.partial")
    assert len(bins(draft)) == 5
    assert list(draft.glob("*.tmp")) == []
    assert content(prepare(data, cache).folder) == content(prepare(data, tmp_path / "expected").folder)


# Interrupted


def count_writes(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """The shards that are made from now on. `stop_at` more are made before Ctrl-C."""
    made: list[str] = []
    true = Draft.write

    def write(draft: Draft, split: str, number: int, *arguments: Any) -> Any:
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append(f"{split} {number}")
        return true(draft, split, number, *arguments)

    monkeypatch.setattr(Draft, "write", write)
    return made


def test_an_interrupted_build_goes_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shards are made in each call, until all are there. None is made twice."""
    data = data_of(kind, tmp_path)
    expected = prepare(data, tmp_path / "expected")
    made: list[str] = []
    for _ in range(1000):
        with monkeypatch.context() as patch:
            now = count_writes(patch, stop_at=4)
            try:
                store = prepare(data, tmp_path / "cache")
                made += now
                break
            except KeyboardInterrupt:
                made += now
                assert len(now) == 4
    assert len(made) == len(set(made)) == sum(len(s.tokens.shards) for s in (store.train, store.valid))
    assert content(store.folder) == content(expected.folder)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "other entry", "entry cut"])
def test_a_finished_shard_that_was_damaged_is_made_again(kind: str, harm: str, tmp_path: Path, monkeypatch) -> None:
    data = data_of(kind, tmp_path)
    expected = prepare(data, tmp_path / "expected")
    with monkeypatch.context() as patch:
        count_writes(patch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, tmp_path / "cache")
    (draft,) = (tmp_path / "cache").glob("*.partial")
    file, entry = draft / "train.00002.bin", draft / "train.00002.json"
    whole = bytearray(file.read_bytes())
    whole[3] ^= 64
    match harm:
        case "flip":
            file.write_bytes(whole)
        case "cut":
            os.truncate(file, 3)
        case "gone":
            file.unlink()
        case "other entry":
            entry.write_bytes((draft / "train.00001.json").read_bytes())
        case _:
            os.truncate(entry, 9)
    made = count_writes(monkeypatch)
    store = prepare(data, tmp_path / "cache")
    assert made[0] == "train 2"
    assert not {"train 0", "train 1", "train 3"} & set(made)
    assert content(store.folder) == content(expected.folder)


def test_shards_of_another_rule_are_made_again(data: DataConfig, tmp_path: Path, monkeypatch) -> None:
    """A version of the program with larger parts goes on."""
    with monkeypatch.context() as patch:
        count_writes(patch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, tmp_path / "cache")
    monkeypatch.setattr(text_plan, "PART_BYTES", 2 * PART)
    store = prepare(data, tmp_path / "cache")
    assert content(store.folder) == content(prepare(data, tmp_path / "expected").folder)


def test_a_text_edited_between_two_calls_is_another_store(data: DataConfig, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        count_writes(patch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, tmp_path / "cache")
    path = Path(data.source)
    path.write_text(path.read_text().replace("Story 7", "Story X"))
    store = prepare(data, tmp_path / "cache")
    assert content(store.folder) == content(prepare(data, tmp_path / "expected").folder)


def test_bytes_that_do_not_read_back_are_said(data: DataConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store_draft, "digest_of", lambda path, also: "0" * 32)
    with pytest.raises(UserError, match=r"train\.00000\.bin: does not read back as it was written; check the disk"):
        prepare(data, tmp_path / "cache")


# Damaged after it was made


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_damaged_shard_is_found_at_its_first_use_and_made_again(
    number: int, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(data, tmp_path / "cache")
    expected = content(store.folder)
    name = bins(store.folder)[number]
    whole = bytearray(expected[name])
    whole[len(whole) // 2] ^= 1
    (store.folder / name).write_bytes(whole)
    store = prepare(data, tmp_path / "cache")  # nothing is read yet
    with pytest.raises(UserError, match=rf"{name}: damaged, .*; start again: only this shard is prepared again$"):
        store.train.tokens[:]
    made = count_writes(monkeypatch)
    again = prepare(data, tmp_path / "cache")
    assert made == [f"train {int(name[6:11])}", "valid 0"]
    assert content(again.folder) == expected
    assert again.digest == store.digest


@pytest.mark.parametrize("kind", ["chat"], indirect=True)
def test_a_damaged_mask_is_found_at_its_first_use_and_made_again(kind: str, tmp_path: Path, monkeypatch) -> None:
    data = data_of(kind, tmp_path)
    store = prepare(data, tmp_path / "cache")
    expected = content(store.folder)
    mask = store.folder / "train.00002.mask"
    mask.write_bytes(bytes(len(expected[mask.name])))
    answers = prepare(data, tmp_path / "cache").train.answers
    assert answers is not None
    with pytest.raises(UserError, match=r"train\.00002\.mask: damaged"):
        answers[:]
    made = count_writes(monkeypatch)
    assert content(prepare(data, tmp_path / "cache").folder) == expected
    assert made[0] == "train 2"


@pytest.mark.parametrize("lie", [{"tokens": 5}, {"stories": -1}, {"bytes": "many"}, {"digest": ""}], ids=str)
def test_a_store_whose_index_lies_is_made_again(lie: dict[str, Any], data: DataConfig, tmp_path: Path) -> None:
    store = prepare(data, tmp_path / "cache")
    expected = content(store.folder)
    index = json.loads(expected["manifest.json"])
    index["splits"]["train"]["shards"][1].update(lie)
    (store.folder / "manifest.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="prepare the data again"):
        open_store(store.folder)
    assert content(prepare(data, tmp_path / "cache").folder) == expected


def test_a_start_on_a_prepared_text_reads_neither_the_text_nor_the_shards(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_notes, "_CLOCK_SECONDS", -10.0)
    store = prepare(data, tmp_path / "cache")
    read: list[str] = []
    true = shards.digest_of
    monkeypatch.setattr(shards, "digest_of", lambda path: read.append(path.name) or true(path))
    for module in (text_files, text_plan, file_corpus):
        monkeypatch.setattr(module, "read_chunks", lambda *_: pytest.fail("the text was read"))
    again = prepare(data, tmp_path / "cache")
    assert read == ["valid.bin"]
    assert again.digest == store.digest
    again.train.tokens[3:5]
    assert read == ["valid.bin", "train.00000.bin"]


def test_a_shard_without_documents(tmp_path: Path) -> None:
    """Rows whose text is empty fill the first parts. The first separator is there all the same."""
    row = json.dumps({"text": " ", "filler": "x" * 100}) + "\n"
    good = json.dumps({"text": "A hen."}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 10 + good + row * 10 + good)
    (tmp_path / "valid.txt").write_text("An egg.")
    store = prepare(DataConfig(source=str(tmp_path), tokenizer="byte"), tmp_path / "cache")
    assert [shard.length for shard in store.train.tokens.shards][:2] == [1, 0]
    assert store.train.tokens[:].tolist() == [256, *b"A hen.", 256, *b"A hen.", 256]


def test_an_empty_split_of_several_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text((json.dumps({"text": " ", "filler": "x" * 100}) + "\n") * 20)
    (tmp_path / "valid.txt").write_text("An egg.")
    with pytest.raises(UserError, match=r"train\.jsonl \(train\): there is no text in it"):
        prepare(DataConfig(source=str(tmp_path), tokenizer="byte"), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.partial")) == []


def test_a_tokenizer_learns_from_the_text_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part in which the learner stops is read to its end. Later parts are not read."""
    data = data_of("bpe", tmp_path)
    path, true = Path(data.source), token_store.train_tokenizer
    whole = path.read_text()

    def edited(at: int) -> Any:
        def train(data: DataConfig, text: Any, *rest: Any) -> Any:
            path.write_text(whole.replace(f"Story {at}:", f"Storm {at}:"))
            next(text.documents("train"))
            path.write_text(whole)
            return true(data, token_store.open_corpus(data), *rest)

        return train

    for at, noticed in ((3, True), (40, False)):
        monkeypatch.setattr(token_store, "train_tokenizer", edited(at))
        corpus = token_store.open_corpus(data)
        arguments = (data, corpus, corpus.fingerprint(), tmp_path, False)
        if noticed:
            with pytest.raises(UserError, match="the text was changed while it was read"):
                token_store._cached_tokenizer(*arguments)
        else:
            token_store._cached_tokenizer(*arguments)
