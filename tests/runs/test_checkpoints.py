"""Checkpoints come back to the last bit or not at all, and a failed save costs no earlier one."""

import gc
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.runs import checkpoint, manifest
from moe_jax.runs.checkpoint import FOLDER, Checkpoint, CheckpointStore, restore
from moe_jax.runs.manifest import CheckpointCorrupted
from tests.support import tiny


def state(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "params": {"blocks": {0: {"router": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}}, "norm": jnp.ones(4)},
        "step": jnp.int32(seed),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-40], jnp.float32),
    }


def save(store: CheckpointStore, step: int, val_loss: float | None = None) -> Path:
    return store.save(state(step), step, val_loss=val_loss, elapsed=1.5 * step, context={"data": "d"})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> CheckpointStore:
    return CheckpointStore(tmp_path, say=said.append)


def steps(store: CheckpointStore) -> list[int]:
    return [c.step for c in store.list()]


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


def some(checkpoint: Checkpoint | None) -> Checkpoint:
    assert checkpoint is not None
    return checkpoint


# Saved by orbax


def test_everything_comes_back_to_the_last_bit(store: CheckpointStore) -> None:
    save(store, 7, 1.25)
    newest = some(store.newest())
    assert (newest.step, newest.val_loss, newest.elapsed) == (7, 1.25, 10.5)
    assert newest.manifest["context"] == {"data": "d"}
    assert {"jax", "flax"} <= set(newest.manifest["versions"])
    assert set(newest.manifest["leaves"]) == {"params.blocks.0.router", "params.norm", "step", "half", "odd"}
    tiny.assert_same_bits(restore(newest, jax.eval_shape(lambda: state(7))), state(7))
    # A part alone, as for generation, which needs no optimizer.
    tiny.assert_same_bits(restore(newest, {"params": state()["params"]})["params"], state(7)["params"])
    for target, name in (
        ({"step": jnp.zeros(2, jnp.int32)}, "step is"),
        ({"step": jnp.float32(0)}, "step is"),
        ({"params": {"absent": jnp.zeros(1)}}, "params.absent is not there"),
        ({"params": {"blocks": {0: {"router": jnp.zeros((4, 3))}}}}, r"router is \[3, 4\] float32 there and \[4, 3\]"),
    ):
        with pytest.raises(UserError, match=name):
            restore(newest, target)


def test_a_step_that_is_saved_again_gets_a_new_manifest_or_is_replaced(store: CheckpointStore) -> None:
    """A resumed run makes up an evaluation: the arrays are the same. Other arrays take the place of the old ones."""
    folder = save(store, 3)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != manifest.NAME}
    save(store, 3, 2.0)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (some(store.newest()).val_loss, names(store)) == (2.0, ["step_00000003"])
    store.save(state(99), 3, val_loss=1.0, elapsed=0, context={})
    assert (some(store.newest()).val_loss, names(store)) == (1.0, ["step_00000003"])
    tiny.assert_same_bits(restore(some(store.newest()), jax.eval_shape(state)), state(99))


def test_saves_leave_nothing_behind_in_memory(store: CheckpointStore) -> None:
    """Orbax 0.11.39 and later leave four of Python's blocks an array and 270 a save: see pyproject.toml."""
    arrays = {f"{i}": jnp.zeros(2) for i in range(100)}

    def save(steps: range) -> int:
        for step in steps:
            store.save(arrays, step, val_loss=None, elapsed=0.0, context={})
        gc.collect()
        return sys.getallocatedblocks()

    before = save(range(3))  # what the first saves keep for the later ones
    assert save(range(3, 8)) - before < 5 * len(arrays)


# Saved without orbax


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save without orbax."""
    monkeypatch.setattr(checkpoint, "write_arrays", lambda folder, _: (folder / "file").write_text("content"))
    monkeypatch.setattr(checkpoint, "write_weights", lambda *_: None)


def put(store: CheckpointStore, step: int, val_loss: float | None = None) -> Path:
    """A checkpoint of one file, not by `save`."""
    folder = store.folder / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "file").write_text("content")
    document = {"version": 3, "step": step, "val_loss": val_loss, "elapsed": 1.5, "state": "s"}
    document |= {"files": manifest.describe_files(folder), "leaves": {}, "context": {}, "versions": {}}
    (folder / manifest.NAME).write_text(manifest.render(document))
    return folder


def change_file(folder: Path) -> None:
    (folder / "file").write_text("CONTENT")


def cut_manifest(folder: Path) -> None:
    (folder / manifest.NAME).write_text("{")


@pytest.mark.usefixtures("quick")
def test_a_loss_that_is_not_finite_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "run")
    for step, (loss, known) in enumerate([(0.0, 0.0), (None, None), (math.nan, None), (math.inf, None)]):
        path = store.save({"a": np.zeros(3)}, step, val_loss=loss, elapsed=2.5, context={})
        assert path == tmp_path / "new" / "run" / FOLDER / f"step_0000000{step}"
        assert store.at(step).val_loss == known


@pytest.mark.usefixtures("quick")
def test_everything_is_on_the_disk_before_the_draft_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files, their folder, and after the rename the folder above it."""
    synced: list[str] = []
    true = checkpoint._sync

    def sync(*paths: Path) -> None:
        for path in paths:
            draft = path.name.startswith("tmp_") or path.parent.name.startswith("tmp_")
            synced.append("draft" if path.name.startswith("tmp_") else path.name)
            assert (tmp_path / FOLDER / "step_00000001").exists() != draft
        true(*paths)

    monkeypatch.setattr(checkpoint, "_sync", sync)
    save(CheckpointStore(tmp_path), 1)
    assert sorted(synced[:-2]) == ["file", "manifest.json"]
    assert synced[-2:] == ["draft", FOLDER]


@pytest.mark.usefixtures("quick")
def test_what_a_killed_save_left_is_no_checkpoint_and_goes_with_the_next(store: CheckpointStore) -> None:
    put(store, 1)
    (store.folder / "tmp_00000002" / "arrays").mkdir(parents=True)
    (store.folder / "damaged_00000004").mkdir()
    assert some(store.newest()).step == 1
    assert store.interrupted_saves() == ("tmp_00000002",)
    save(store, 3)
    assert names(store) == ["damaged_00000004", "step_00000001", "step_00000003"]


# Listed and chosen


def test_steps_are_listed_by_their_number(store: CheckpointStore) -> None:
    for step in (10**8, 99_999_999, 3, 10**9):
        put(store, step)
    for name in ("tmp_00000004", "damaged_00000005", "step_6"):
        (store.folder / name).mkdir()
    (store.folder / "step_00000007").write_text("a file")
    assert steps(store) == [3, 99_999_999, 10**8, 10**9]
    assert store.at(3).path == store.folder / "step_00000003"
    with pytest.raises(UserError, match=r"^--step 4: .* it has 3, 99999999, 100000000, 1000000000$"):
        store.at(4)


@pytest.mark.parametrize(
    ("losses", "best", "kept"),
    [
        ({1: None}, 1, [1]),
        ({1: None, 2: None, 3: None}, 3, [2, 3]),
        ({1: 2.0, 2: 1.0, 3: 3.0, 4: 4.0}, 2, [2, 3, 4]),
        ({1: 1.0, 2: 1.0, 3: None, 4: None}, 1, [1, 3, 4]),  # of equal ones the earlier
        ({1: 2.0, 2: 3.0, 3: 1.0}, 3, [2, 3]),
        ({1: 0.0, 2: -1.0, 3: None, 4: None}, 2, [2, 3, 4]),
        ({99_999_998: None, 99_999_999: None, 10**8: 1.0}, 10**8, [99_999_999, 10**8]),
    ],
)
def test_the_best_has_the_lowest_loss_and_stays_with_the_newest_two(
    losses: dict[int, float | None], best: int, kept: list[int], store: CheckpointStore
) -> None:
    folders = [put(store, step, loss) for step, loss in losses.items()]
    assert some(store.best()).step == best
    store._remove_old(folders[-1])
    assert steps(store) == kept


def test_the_next_best_where_the_best_is_damaged(store: CheckpointStore, said: list[str]) -> None:
    """Then the ones that were not evaluated, the newest first."""
    folders = {step: put(store, step, loss) for step, loss in ((1, None), (2, 1.0), (3, 2.0), (4, None), (5, None))}
    cut_manifest(folders[5])
    for step in (2, 3, 4, 1):
        assert some(store.best()).step == step
        change_file(folders[step])
    assert store.best() is None
    assert said[0] == f"{folders[5]}: skipped, its manifest was changed", "it may be the best, so it is said first"


def test_nothing_is_removed_before_the_newest_reads_back(store: CheckpointStore) -> None:
    folders = [put(store, step) for step in (1, 2, 3, 4)]
    cut_manifest(folders[0])
    change_file(folders[3])
    with pytest.raises(UserError, match=rf"^{folders[3]}: file was changed between writing and reading it back; "):
        store._remove_old(folders[3])
    assert steps(store) == [2, 3, 4]
    shutil.rmtree(folders[3])
    put(store, 4)
    store._remove_old(folders[3])
    assert names(store) == ["step_00000001", "step_00000003", "step_00000004"], "damaged ones are not removed"


# Restored


@pytest.fixture
def no_arrays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose arrays turn out to be damaged when they are read."""
    damaged: list[int] = []

    def restore(found: Checkpoint, target: Any) -> Any:
        if found.step in damaged:
            raise CheckpointCorrupted("its arrays do not open")
        return target

    monkeypatch.setattr(checkpoint, "_restore_verified", restore)
    return damaged


def test_a_resume_renames_what_is_newer_and_damaged(
    store: CheckpointStore, no_arrays: list[int], said: list[str]
) -> None:
    folders = [put(store, step) for step in (1, 2, 3, 4)]
    change_file(folders[0])
    cut_manifest(folders[3])
    no_arrays.append(3)
    newest, _ = store.restore_newest({}, lambda _: None) or pytest.fail("none is good")
    assert newest.step == 2
    assert names(store) == ["damaged_00000003", "damaged_00000004", "step_00000001", "step_00000002"]
    assert [line.rpartition(", ")[2] for line in said] == ["its manifest was changed", "its arrays do not open"]
    for expected in ("damaged_00000003.2", "damaged_00000003.3"):  # all of them are kept
        assert store.mark_damaged(put(store, 3)).name == expected


def test_where_none_is_good_or_one_is_of_another_run_nothing_is_renamed(
    store: CheckpointStore, no_arrays: list[int]
) -> None:
    def check(found: Checkpoint) -> None:
        raise UserError(f"step {found.step} is of another run")

    for step in (1, 2):
        put(store, step)
    with pytest.raises(UserError, match="step 2 is of another run"):
        store.restore_newest({}, check)
    no_arrays += [1, 2]
    assert store.restore_newest({}, lambda _: None) is None
    assert names(store) == ["step_00000001", "step_00000002"]
