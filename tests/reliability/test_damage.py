"""A damaged checkpoint is noticed, and the one before it is restored: never something else, silently."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.runs.checkpoint import CheckpointStore, verify
from tests.reliability import states

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("two")
    store = CheckpointStore(run)
    states.save(store, 1, 3.0)
    states.save(store, 2)
    return run


def outcome(run: Path) -> str:
    """What a resume of the run gets: "newest", "previous", "nothing", or "wrong"."""
    store = CheckpointStore(run, say=lambda _: None)
    restored = store.restore_newest(jax.eval_shape(states.state), lambda _: None)
    if restored is None:
        return "nothing"
    checkpoint, state = restored
    if not states.same(state, states.state(checkpoint.step)) or checkpoint.val_loss != (
        3.0 if checkpoint.step == 1 else None
    ):
        return "wrong"
    return {1: "previous", 2: "newest"}[checkpoint.step]


def test_bit_flips(two: Path) -> None:
    """One bit at a time, in a file drawn evenly from all: large files do not hide the small ones."""
    rng = np.random.default_rng(0)
    store = CheckpointStore(two, say=lambda _: None)
    folder = store.folder / "step_00000002"
    paths = [path for path in states.files(folder) if path.stat().st_size]
    missed = []
    for i in range(300):
        path = paths[i % len(paths)]
        original = path.read_bytes()
        changed, position = bytearray(original), int(rng.integers(len(original)))
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        found = [c for c in store.list() if c.path == folder]
        if found and verify(found[0]) is None:
            missed.append((path.name, position))
        path.write_bytes(original)
    assert not missed
    assert outcome(two) == "newest"


def test_unnoticed_flips_would_be_found_out(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The battery itself: with files no longer compared, the digests of the arrays still refuse the weights."""
    shutil.copytree(two, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    largest = max((p for p in states.files(folder / "arrays")), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    weight = np.asarray(states.state(2)["params"]["blocks"][0]["w"]).tobytes()
    data[bytes(data).index(weight[:64]) + 5] ^= 16
    largest.write_bytes(data)
    monkeypatch.setattr("moe_jax.runs.manifest.verify_files", lambda *_: None)
    said: list[str] = []
    store = CheckpointStore(tmp_path / "run", say=said.append)
    checkpoint, state = store.restore_newest(jax.eval_shape(states.state), lambda _: None)
    assert checkpoint.step == 1
    assert states.same(state, states.state(1))
    assert "params.blocks.0.w is not the array that was saved" in said[0]


def zero(path: Path) -> None:
    data = bytearray(path.read_bytes())
    begin = len(data) // 3
    data[begin : begin + 4096] = bytes(min(4096, len(data) - begin))
    path.write_bytes(data)


KINDS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "emptied": lambda p: p.write_bytes(b""),
    "zeroed": zero,
    "extended": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "deleted": lambda p: p.unlink(),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a link": lambda p: p.rename(p.with_name("elsewhere")) and p.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_damaged(kind: str, two: Path, tmp_path: Path) -> None:
    """Each file of the newest checkpoint in turn. A file whose bytes stay as they were is no damage."""
    names = [p.relative_to(two) for p in states.files(two / "checkpoints" / "step_00000002")]
    wrong = count = 0
    for i, name in enumerate(names):
        run = tmp_path / str(i)
        shutil.copytree(two, run)
        before = (run / name).read_bytes()
        KINDS[kind](run / name)
        if kind != "a link" and (run / name).is_file() and (run / name).read_bytes() == before:
            continue
        count += 1
        wrong += outcome(run) != "previous"
    assert count > 5
    assert wrong == 0


def test_files_swapped_between_steps(two: Path, tmp_path: Path) -> None:
    """Each file of step 2 in the place of its like in step 1's folder and the other way round. Orbax names some files
    at random: then the largest file beside it."""
    newer = two / "checkpoints" / "step_00000002"
    count = 0
    for i, path in enumerate(states.files(newer)):
        shutil.copytree(two, tmp_path / str(i))
        old, new = (
            tmp_path / str(i) / "checkpoints" / f"step_0000000{step}" / path.relative_to(newer) for step in (1, 2)
        )
        if not old.exists() and old.parent.is_dir():
            old = max(states.files(old.parent), key=lambda p: p.stat().st_size)
        if not old.exists() or old.read_bytes() == new.read_bytes():
            continue
        first, second = old.read_bytes(), new.read_bytes()
        old.write_bytes(second)
        new.write_bytes(first)
        count += 1
        assert outcome(tmp_path / str(i)) == "nothing", path
    assert count >= 3
