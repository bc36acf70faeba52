"""A damaged checkpoint is noticed, and the one before it is restored: never something else, silently."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import CheckpointStore
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


def protected(folder: Path) -> list[Path]:
    """The files of a checkpoint that its manifest names, and the manifest."""
    return [folder / name for name in (*manifest.read(folder)["files"], manifest.NAME)]


def test_bit_flips(two: Path, tmp_path: Path) -> None:
    """One bit at a time, in a file drawn evenly from all: large files do not hide the small ones."""
    rng = np.random.default_rng(0)
    paths = [path for path in protected(two / "checkpoints" / "step_00000002") if path.stat().st_size]
    missed = []
    for i in range(300):
        path = paths[i % len(paths)]
        original = path.read_bytes()
        changed, position = bytearray(original), int(rng.integers(len(original)))
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        good = CheckpointStore(two, say=lambda _: None).best()
        if good is None or good.step != 1:
            missed.append((path.name, position))
        path.write_bytes(original)
    assert not missed
    shutil.copytree(two, tmp_path / "run")
    assert outcome(tmp_path / "run") == "newest"


def zero(path: Path) -> None:
    data = bytearray(path.read_bytes())
    begin = len(data) // 3
    data[begin : begin + 4096] = bytes(min(4096, len(data) - begin))
    path.write_bytes(data)


KINDS: dict[str, Callable[[Path], object]] = {
    "a bit": lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "emptied": lambda p: p.write_bytes(b""),
    "zeroed": zero,
    "extended": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "deleted": lambda p: p.unlink(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_damaged(kind: str, two: Path, tmp_path: Path) -> None:
    """Each file of the newest checkpoint in turn, and what a resume gets. A file whose bytes stay as they were is no
    damage, and nothing that is restored depends on orbax's note beside the arrays."""
    newest = two / "checkpoints" / "step_00000002"
    unnamed = set(states.files(newest)) - set(protected(newest))
    assert {path.name for path in unnamed} == {"_CHECKPOINT_METADATA"}
    count = 0
    for i, path in enumerate(states.files(newest)):
        run = tmp_path / str(i)
        shutil.copytree(two, run)
        harmed = run / path.relative_to(two)
        if not harmed.stat().st_size and kind == "a bit":
            continue
        KINDS[kind](harmed)
        same = harmed.exists() and harmed.read_bytes() == path.read_bytes()
        assert outcome(run) == ("newest" if same or path in unnamed else "previous"), path
        count += not same
        states.save(CheckpointStore(run), 3)  # orbax goes on beside damage
    assert count > 5
