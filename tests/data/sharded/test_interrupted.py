"""A store in shards, made side by side, interrupted, and gone on with: the same bytes."""

import errno
import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import DataConfig, UserError
from moe_jax.data import shard_workers, store_draft, text_plan, token_store
from moe_jax.data.store_draft import Draft
from moe_jax.data.text_files import SEPARATOR
from tests.data.sharded.stores import PART, bins, content, count_writes, data_of, documents, prepare


@pytest.mark.parametrize("kind", ["bpe", "chat"], indirect=True)
def test_shards_made_side_by_side_have_the_same_bytes(kind: str, tmp_path: Path, monkeypatch) -> None:
    data = data_of(kind, tmp_path)
    one = prepare(data, tmp_path / "one")
    monkeypatch.setattr(token_store, "usable_cores", lambda: 3)
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
    monkeypatch.setattr(token_store, "usable_cores", lambda: 2)
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
    assert list(draft.glob("*.draft")) == []
    assert content(prepare(data, tmp_path / "cache").folder) == content(expected.folder)


def test_a_build_that_is_killed_before_its_rename_costs_no_shard(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft then has an index and no entries. The only shard of a split has no number there: it is made again."""
    store = prepare(data, tmp_path / "cache")
    expected = content(store.folder)
    store.folder.rename(store.folder.with_name(f"{store.folder.name}.partial"))
    made = count_writes(monkeypatch)
    assert content(prepare(data, tmp_path / "cache").folder) == expected
    assert [name for name in made if name.startswith("train")] == []


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
    assert list(cache.glob("*.partial/*.draft")) == []
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
    assert list(draft.glob("*.draft")) == []
    assert content(prepare(data, cache).folder) == content(prepare(data, tmp_path / "expected").folder)


# Interrupted


def test_an_interrupted_build_goes_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shards are made in each call, until all are there. None is made twice."""
    data = data_of(kind, tmp_path)
    expected = prepare(data, tmp_path / "expected")
    made: list[str] = []
    store = None
    while store is None:
        with monkeypatch.context() as patch:
            now = count_writes(patch, stop_at=4)
            try:
                store = prepare(data, tmp_path / "cache")
            except KeyboardInterrupt:
                assert len(now) == 4
            made += now
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
