"""Checkpoints made to harm: nothing in them is executed, and nothing outside is read or written.

Each carries a manifest with right digests, as an attacker's would.
"""

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import CheckpointStore
from tests.reliability import states

pytestmark = pytest.mark.reliability
EXECUTED: list[str] = []


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return EXECUTED.append, ("a pickle ran",)


def reseal(folder: Path, **more: Any) -> None:
    """Write the manifest anew, with right digests of what is there, and more files."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME]
    manifest.write(folder, manifest.read(folder) | {"files": manifest.describe_files(folder, paths) | more})


def pickles(folder: Path) -> None:
    """Everywhere that something might unpickle."""
    for name in ("weights.pkl", "state.pt", "arrays/_METADATA", "arrays/_CHECKPOINT_METADATA", "weights.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    np.save(folder / "objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    reseal(folder)


def names_outside(folder: Path) -> None:
    secret = folder.parent.parent / "secret"
    secret.write_text("secret")
    reseal(folder, **{"../../secret": [6, manifest.file_digest(secret)]})


class Watch:
    """Which files were opened for writing, and what was unpickled or started, while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)  # for good: Python has no way to take one back

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.seen.append((event, arguments))
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.seen.append((event, arguments[0]))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("make", [pickles, names_outside], ids=lambda make: make.__name__)
def test_hostile_checkpoints(make: Callable[[Path], None], tmp_path: Path, watch: Watch) -> None:
    """Refused with one line, and the one before it restored."""
    said: list[str] = []
    store = CheckpointStore(tmp_path, say=said.append)
    for step in (1, 2):
        states.save(store, step)
    make(store.folder / "step_00000002")
    watch.seen.clear()
    watch.on = True
    try:
        restored = store.restore_newest(jax.eval_shape(states.state), lambda _: None)
    finally:
        watch.on = False
    assert EXECUTED == []
    assert watch.seen == []
    assert len(said) == 1
    assert "\n" not in said[0]
    assert restored is not None
    assert restored[0].step == 1
    assert states.same(restored[1], states.state(1))
