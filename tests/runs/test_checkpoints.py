"""Checkpoints come back to the last bit or not at all, and a failed save costs no earlier one."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.runs import checkpoint, manifest
from moe_jax.runs.arrays import WEIGHTS
from moe_jax.runs.checkpoint import FOLDER, Checkpoint, CheckpointStore, restore, stored_shapes
from moe_jax.runs.manifest import CheckpointCorrupted
from tests.support import saved_run, tiny


def state(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "params": {"blocks": {0: {"router": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}}, "norm": jnp.ones(4)},
        "step": jnp.int32(seed),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-40], jnp.float32),
    }


NAMES = {"params.blocks.0.router", "params.norm", "step", "half", "odd"}


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


# Saved by orbax


@pytest.mark.parametrize("version", [3, 4])
def test_everything_comes_back_to_the_last_bit(version: int, store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 7, 1.25)
    if version == 3:
        saved_run.as_version_3(store.at(7))
    newest = saved_run.newest(tmp_path)
    assert newest.manifest["version"] == version
    assert (newest.step, newest.val_loss, newest.elapsed, newest.context) == (7, 1.25, 10.5, {"data": "d"})
    assert {"jax", "flax"} <= set(newest.manifest["versions"])
    assert set(stored_shapes(newest)) == NAMES
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


def test_every_array_is_stored_once(store: CheckpointStore) -> None:
    """The names of the arrays in orbax's own list are those that are not in weights.safetensors."""
    folder = save(store, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["_CHECKPOINT_METADATA", "arrays", manifest.NAME, WEIGHTS]
    listed = (folder / "arrays" / "_METADATA").read_text()
    assert [name in listed for name in ("params", "half", "step")] == [False, True, True]


def test_a_step_that_is_saved_again_gets_a_new_manifest(store: CheckpointStore, tmp_path: Path) -> None:
    """A resumed run makes up an evaluation: the arrays are the same."""
    folder = save(store, 3)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != manifest.NAME}
    save(store, 3, 2.0)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (saved_run.newest(tmp_path).val_loss, names(store)) == (2.0, ["step_00000003"])


@pytest.mark.parametrize(
    ("losses", "best", "kept"),
    [
        ({1: None, 2: None, 3: None}, 3, [2, 3]),
        ({1: 2.0, 2: 1.0, 3: 3.0, 4: 4.0}, 2, [2, 3, 4]),
        ({1: 1.0, 2: 1.0, 3: None, 4: None}, 1, [1, 3, 4]),  # of equal ones the earlier
        ({1: 2.0, 2: 3.0, 3: 1.0}, 3, [2, 3]),
        ({99_999_998: None, 99_999_999: None, 10**8: 1.0}, 10**8, [99_999_999, 10**8]),
    ],
)
def test_the_best_has_the_lowest_loss_and_stays_with_the_newest_two(
    losses: dict[int, float | None], best: int, kept: list[int], store: CheckpointStore
) -> None:
    for step, loss in losses.items():
        store.save({"params": {"w": np.zeros(1)}, "step": np.int32(0)}, step, val_loss=loss, elapsed=0.0, context={})
    found = store.best()
    assert found is not None
    assert found.step == best
    assert steps(store) == kept


def test_a_loss_that_is_not_finite_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "run")
    for step, (loss, known) in enumerate([(0.0, 0.0), (math.nan, None), (math.inf, None)]):
        path = save(store, step, loss)
        assert path == tmp_path / "new" / "run" / FOLDER / f"step_0000000{step}"
        assert store.at(step).val_loss == known


def test_what_a_killed_save_left_is_no_checkpoint_and_goes_with_the_next(store: CheckpointStore) -> None:
    save(store, 1)
    (store.folder / "step_00000002.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    (store.folder / "damaged_00000004").mkdir()
    assert steps(store) == [1]
    save(store, 3)
    assert names(store) == ["damaged_00000004", "step_00000001", "step_00000003"]


# Saved without orbax


def put(store: CheckpointStore, step: int, val_loss: float | None = None) -> Path:
    """A checkpoint of one file."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).write_text("content")

    path = store.save_weights(write, step, elapsed=1.5, context={})
    manifest.write(path, manifest.read(path) | {"val_loss": val_loss})
    return path


def change_file(folder: Path) -> None:
    (folder / WEIGHTS).write_text("CONTENT")


def cut_manifest(folder: Path) -> None:
    (folder / manifest.NAME).write_text("{")


def test_weights_alone_are_whole_or_absent(store: CheckpointStore) -> None:
    def fail(folder: Path) -> None:
        (folder / WEIGHTS).write_text("half")
        raise OSError(28, "No space left on device")

    put(store, 1)
    with pytest.raises(UserError, match=r"step_00000002: the checkpoint could not be saved \(the disk is full\); "):
        store.save_weights(fail, 2, elapsed=0.0, context={})
    assert names(store) == ["step_00000001"]


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


def test_the_next_best_where_the_best_is_damaged(store: CheckpointStore, said: list[str]) -> None:
    """Then the ones that were not evaluated, the newest first."""
    folders = {step: put(store, step, loss) for step, loss in ((1, None), (2, 1.0), (3, 2.0), (4, None), (5, None))}
    cut_manifest(folders[5])
    for step in (2, 3, 4, 1):
        found = store.best()
        assert found is not None
        assert found.step == step
        change_file(folders[step])
    assert store.best() is None
    assert said[0] == f"{folders[5]}: skipped, its manifest was changed", "it may be the best, so it is said first"


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


def test_every_checkpoint_is_examined_and_nothing_changes(store: CheckpointStore) -> None:
    folders = [put(store, step) for step in (1, 2, 3)]
    (folders[0] / "unknown").write_text("not in the manifest")
    change_file(folders[1])
    cut_manifest(folders[2])
    before = {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}
    damages = (None, f"{WEIGHTS} was changed", "its manifest was changed")
    assert list(store.examine()) == list(zip(folders, damages, strict=True))
    assert {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()} == before
