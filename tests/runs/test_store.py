"""Which checkpoints of a run are listed, chosen, kept and renamed. No array is read here: manifests alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import UserError
from moe_jax.runs import checkpoint, manifest
from moe_jax.runs.checkpoint import FOLDER, Checkpoint, CheckpointStore
from moe_jax.runs.manifest import CheckpointCorrupted, CheckpointUnreadable
from moe_jax.system.step_names import step_name


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> CheckpointStore:
    (tmp_path / FOLDER).mkdir()
    return CheckpointStore(tmp_path, said.append)


def put(store: CheckpointStore, step: int, val_loss: float | None = None, name: str = "") -> Path:
    """A checkpoint with one file and no arrays."""
    folder = store.folder / (name or step_name(step))
    folder.mkdir()
    (folder / "file").write_text(f"content {step}")
    document = {"version": 3, "step": step, "val_loss": val_loss, "elapsed": 1.5, "state": "", "leaves": {}}
    document |= {"files": manifest.describe_files(folder), "context": {}, "versions": {}}
    (folder / manifest.NAME).write_text(manifest.render(document))
    return folder


def cut_manifest(folder: Path) -> None:
    (folder / manifest.NAME).write_text("{")


def change_file(folder: Path) -> None:
    (folder / "file").write_text("Content 7")


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The system refuses to read the manifest of a checkpoint."""
    true = manifest.read

    def read(folder: Path) -> dict[str, Any]:
        if folder.name == name:
            raise CheckpointUnreadable(f"{name}: refused")
        return true(folder)

    monkeypatch.setattr(manifest, "read", read)


def steps(store: CheckpointStore) -> list[int]:
    return [c.step for c in store.list()]


# Listed


def test_steps_are_listed_by_their_number(store: CheckpointStore) -> None:
    for step in (10**8, 99_999_999, 3, 10**9):
        put(store, step)
    (store.folder / "tmp_00000004_1").mkdir()
    (store.folder / "damaged_00000005").mkdir()
    (store.folder / "step_6").mkdir()
    (store.folder / "step_00000007").write_text("a file")
    assert steps(store) == [3, 99_999_999, 10**8, 10**9]
    assert [path.name for path, _ in store.list_all()][1] == "step_00000007"
    first = store.list()[0]
    assert (first.path, first.val_loss, first.elapsed) == (store.folder / "step_00000003", None, 1.5)


def test_of_a_step_that_was_saved_twice_the_newer_counts(store: CheckpointStore) -> None:
    put(store, 3, 1.0, "step_00000003.replaced")
    assert [c.val_loss for c in store.list()] == [1.0]
    put(store, 3, 2.0)
    assert [c.val_loss for c in store.list()] == [2.0]


def test_without_a_folder_there_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert (store.list(), store.newest(), store.best(), store.interrupted_saves()) == ([], None, None, ())
    with pytest.raises(UserError, match=rf"^--step 3: {tmp_path}/checkpoints has no such checkpoint; it has none$"):
        store.at(3)


# Chosen


def test_the_newest_that_is_whole(store: CheckpointStore, said: list[str]) -> None:
    folders = [put(store, step) for step in (1, 2, 3, 4)]
    cut_manifest(folders[3])
    change_file(folders[2])
    found = store.newest()
    assert found is not None
    assert found.step == 2
    assert said == [
        f"{folders[3]}: skipped, its manifest was changed",
        f"{folders[2]}: skipped, file was changed",
    ]
    for folder in folders[:2]:
        change_file(folder)
    assert store.newest() is None


def test_messages_go_to_stderr_unless_somebody_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FOLDER).mkdir()
    store = CheckpointStore(tmp_path)
    change_file(put(store, 1))
    assert store.newest() is None
    out, err = capsys.readouterr()
    assert (out, err.count("skipped")) == ("", 1)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({1: 2.0, 2: 1.0, 3: 3.0}, 2),
        ({1: 1.0, 2: 1.0, 3: 2.0}, 1),  # of equal ones the earlier
        ({1: None, 2: 5.0, 3: None}, 2),
        ({1: None, 2: None, 3: None}, 3),
        ({1: -1.0, 2: 0.0, 3: 1.0}, 1),
        ({10**8: 1.0, 99_999_999: 1.0}, 99_999_999),
    ],
)
def test_the_best_has_the_lowest_loss(losses: dict[int, float | None], best: int, store: CheckpointStore) -> None:
    for step, loss in losses.items():
        put(store, step, loss)
    found = store.best()
    assert found is not None
    assert found.step == best


def test_the_next_best_where_the_best_is_damaged(store: CheckpointStore, said: list[str]) -> None:
    """Then those that were not evaluated, the newest first."""
    folders = {step: put(store, step, loss) for step, loss in ((1, None), (2, 1.0), (3, 2.0), (4, None), (5, None))}
    cut_manifest(folders[5])
    order = []
    for step in (2, 3, 4, 1):
        found = store.best()
        assert found is not None
        order.append(found.step)
        change_file(folders[step])
    assert order == [2, 3, 4, 1]
    assert store.best() is None
    assert said[0] == f"{folders[5]}: skipped, its manifest was changed", "it may be the best, so it is said first"


@pytest.mark.parametrize("choose", ["list", "newest", "best"])
def test_one_that_the_system_refuses_is_not_passed_over(
    choose: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1, 1.0)
    put(store, 2, 2.0)
    refuse(monkeypatch, "step_00000002")
    with pytest.raises(CheckpointUnreadable, match="step_00000002: refused"):
        getattr(store, choose)()
    assert isinstance(store.list_all()[1][1], CheckpointUnreadable)


def test_a_step_is_found_by_its_number(store: CheckpointStore) -> None:
    for step in (1, 2, 30):
        put(store, step)
    assert store.at(2).step == 2
    with pytest.raises(UserError, match=r"^--step 3: .* it has 1, 2, 30$"):
        store.at(3)


# Restored


def restore_newest(store: CheckpointStore, check: Any = lambda _: None) -> int | None:
    found = store.restore_newest({}, check)
    return None if found is None else found[0].step


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


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


def test_a_resume_renames_what_is_newer_and_damaged(
    store: CheckpointStore, no_arrays: list[int], said: list[str]
) -> None:
    folders = [put(store, step) for step in (1, 2, 3, 4)]
    change_file(folders[0])
    cut_manifest(folders[3])
    no_arrays.append(3)
    assert restore_newest(store) == 2
    assert names(store) == ["damaged_00000003", "damaged_00000004", "step_00000001", "step_00000002"]
    assert [line.rpartition(": ")[2] for line in said] == [
        "skipped, its manifest was changed",
        "skipped, its arrays do not open",
    ]


def test_where_none_is_good_nothing_is_renamed(store: CheckpointStore, no_arrays: list[int]) -> None:
    for step in (1, 2):
        put(store, step)
    no_arrays += [1, 2]
    assert restore_newest(store) is None
    assert names(store) == ["step_00000001", "step_00000002"]


def test_a_checkpoint_of_another_run_stops_the_resume(store: CheckpointStore, no_arrays: list[int]) -> None:
    def check(found: Checkpoint) -> None:
        raise UserError(f"step {found.step} is of another run")

    put(store, 1)
    put(store, 2)
    with pytest.raises(UserError, match="step 2 is of another run"):
        restore_newest(store, check)
    assert names(store) == ["step_00000001", "step_00000002"]


def test_damaged_ones_of_the_same_step_are_all_kept(store: CheckpointStore) -> None:
    for expected in ("damaged_00000003", "damaged_00000003.2", "damaged_00000003.3"):
        assert store.mark_damaged(put(store, 3)).name == expected
    assert store.mark_damaged(put(store, 4, name="step_00000004.replaced")).name == "damaged_00000004"
    assert len(names(store)) == 4


# Interrupted saves


def test_what_interrupted_saves_left_is_removed_or_restored(store: CheckpointStore) -> None:
    put(store, 1)
    put(store, 1, name="step_00000001.replaced")  # the newer one is there
    put(store, 2, name="step_00000002.replaced")  # the newer one is missing
    (store.folder / "tmp_00000003_7" / "arrays").mkdir(parents=True)
    (store.folder / "notes.replaced").mkdir()
    (store.folder / "damaged_00000004").mkdir()
    assert store.interrupted_saves() == ("tmp_00000003_7",)
    removed = store.remove_interrupted_saves()
    assert [path.relative_to(store.folder).as_posix() for path in removed] == [
        "tmp_00000003_7",
        "step_00000001.replaced",
    ]
    assert names(store) == ["damaged_00000004", "notes.replaced", "step_00000001", "step_00000002"]
    assert steps(store) == [1, 2]


# Kept


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({1: None}, [1]),
        ({1: None, 2: None}, [1, 2]),
        ({1: None, 2: None, 3: None}, [2, 3]),
        ({1: 1.0, 2: None, 3: None}, [1, 2, 3]),
        ({1: 1.0, 2: 1.0, 3: None, 4: None}, [1, 3, 4]),  # of equal ones `best` takes the earlier
        ({1: 2.0, 2: 1.0, 3: 3.0, 4: 4.0}, [2, 3, 4]),
        ({1: 2.0, 2: 3.0, 3: 1.0}, [2, 3]),
        ({1: 0.0, 2: -1.0, 3: None, 4: None}, [2, 3, 4]),
        ({99_999_998: None, 99_999_999: None, 10**8: None}, [99_999_999, 10**8]),
    ],
)
def test_the_newest_two_and_the_best_stay(
    losses: dict[int, float | None], kept: list[int], store: CheckpointStore
) -> None:
    folders = [put(store, step, loss) for step, loss in losses.items()]
    store._remove_old(folders[-1])
    assert steps(store) == kept


def test_nothing_is_removed_before_the_newest_reads_back(store: CheckpointStore) -> None:
    folders = [put(store, step) for step in (1, 2, 3)]
    change_file(folders[2])
    with pytest.raises(UserError, match=rf"^{folders[2]}: file was changed between writing and reading it back; "):
        store._remove_old(folders[2])
    assert steps(store) == [1, 2, 3]


def test_damaged_ones_are_not_removed(store: CheckpointStore) -> None:
    folders = [put(store, step) for step in (1, 2, 3, 4)]
    cut_manifest(folders[0])
    store._remove_old(folders[3])
    assert names(store) == ["step_00000001", "step_00000003", "step_00000004"]


def test_a_step_takes_the_place_of_an_earlier_one(store: CheckpointStore) -> None:
    put(store, 3, 1.0)
    put(store, 3, 1.5, "step_00000003.replaced")
    draft = put(store, 3, 2.0, "tmp_00000003_1")
    shutil.rmtree(store.folder / "step_00000003.replaced")
    store._publish(draft, store.folder / "step_00000003")
    assert names(store) == ["step_00000003"]
    assert [c.val_loss for c in store.list()] == [2.0]
