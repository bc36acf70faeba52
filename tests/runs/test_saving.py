"""How a checkpoint is written: what is known of it, what is asked before, and what is on the disk when."""

import errno
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.runs import checkpoint
from moe_jax.runs.checkpoint import FOLDER, CheckpointStore


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save without orbax."""
    monkeypatch.setattr(checkpoint, "write_arrays", lambda folder, _: (folder / "file").write_text("arrays"))
    monkeypatch.setattr(checkpoint, "write_weights", lambda *_: None)


def save(store: CheckpointStore, val_loss: float | None = None, step: int = 1) -> Path:
    return store.save({"a": np.zeros(3)}, step, val_loss=val_loss, elapsed=2.5, context={"run_id": "x"})


@pytest.mark.parametrize(
    ("given", "known"), [(1.5, 1.5), (0.0, 0.0), (None, None), (math.nan, None), (math.inf, None), (-math.inf, None)]
)
def test_a_loss_that_is_not_finite_is_none(given: float | None, known: float | None, tmp_path: Path, quick: None):
    store = CheckpointStore(tmp_path / "new" / "run")
    path = save(store, given)
    assert path == tmp_path / "new" / "run" / FOLDER / "step_00000001"
    found = store.at(1)
    assert (found.val_loss, found.elapsed, found.manifest["context"]) == (known, 2.5, {"run_id": "x"})
    assert found.manifest["leaves"]["a"][:2] == [[3], "float64"]
    assert {"jax", "flax"} <= set(found.manifest["versions"])
    assert list(found.manifest["files"]) == ["file"]


def test_a_guard_that_refuses_stops_a_save_before_it_makes_anything(tmp_path: Path, quick: None) -> None:
    def refuse() -> None:
        raise UserError("not any more")

    with pytest.raises(UserError, match="not any more"):
        save(CheckpointStore(tmp_path / "run", guard=refuse))
    assert not (tmp_path / "run").exists()


def test_room_is_asked_for_all_arrays_and_twice_for_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 bytes of the optimizer, and 16 of parameters, which are also written as safetensors."""
    leaves = {"opt": np.zeros(3), "params.w": np.zeros(2)}
    for free, fits in ((56, True), (55, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            checkpoint._check_room(tmp_path, leaves)
        else:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
                checkpoint._check_room(tmp_path, leaves)
            assert caught.value.errno == errno.ENOSPC


def test_everything_is_on_the_disk_before_the_draft_is_renamed(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files, their folder, and after the rename the folder above it."""
    synced: list[str] = []

    def sync(path: Path) -> None:
        draft = path.name.startswith("tmp_") or path.parent.name.startswith("tmp_")
        synced.append("draft" if path.name.startswith("tmp_") else path.name)
        assert (tmp_path / FOLDER / "step_00000001").exists() != draft

    monkeypatch.setattr(checkpoint, "_sync_path", sync)
    save(CheckpointStore(tmp_path))
    assert sorted(synced[:-2]) == ["file", "manifest.json"]
    assert synced[-2:] == ["draft", FOLDER]


def test_files_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path):
        checkpoint._sync_path(path)
    assert len(synced) == 2
    assert before is None or set(os.listdir("/proc/self/fd")) == before, "a descriptor stays open"


def test_a_draft_is_removed_though_threads_still_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the folder comes back. It is not tried for ever."""
    (tmp_path / "draft").mkdir()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) < 3:
            (tmp_path / "draft").mkdir()

    monkeypatch.setattr(checkpoint.time, "sleep", wait)
    checkpoint._remove_draft(tmp_path / "draft")
    assert (len(waits), (tmp_path / "draft").exists()) == (3, False)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    (tmp_path / "draft").mkdir()
    checkpoint._remove_draft(tmp_path / "draft")
    assert len(waits) < 50


@pytest.mark.parametrize(("platform", "trimmed"), [("linux", [0]), ("darwin", [])])
def test_memory_is_given_back_where_the_library_can(
    platform: str, trimmed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(checkpoint.sys, "platform", platform)
    monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=given.append))
    checkpoint._give_memory_back()
    assert given == trimmed
    monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda _: SimpleNamespace())
    checkpoint._give_memory_back()
