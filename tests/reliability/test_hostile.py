"""Checkpoints made to harm: nothing in them is executed, nothing outside is read or written, little is allocated.

Each carries a manifest with right digests, as an attacker's would.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import CheckpointStore
from tests.reliability import runs, states

pytestmark = pytest.mark.reliability
EXECUTED: list[str] = []


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return EXECUTED.append, ("a pickle ran",)


def reseal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Write the manifest anew, with right digests of what is there, and a change on top."""
    document = json.loads((folder / manifest.NAME).read_text())
    document["files"] = {n: d for n, d in manifest.describe_files(folder).items() if n != manifest.NAME}
    change(document)
    (folder / manifest.NAME).write_text(manifest.render(document))


def deep(folder: Path) -> None:
    (folder / manifest.NAME).write_text("[" * 1_000_000)


def huge(folder: Path) -> None:
    with (folder / manifest.NAME).open("ab") as file:
        file.truncate(2**33)


def many(folder: Path) -> None:
    (folder / manifest.NAME).write_text(
        '{"version": 3, "files": {' + ",".join(f'"{i}": [1, ""]' for i in range(10**6)) + "}}"
    )


def pickles(folder: Path) -> None:
    """Everywhere that something might unpickle."""
    for name in ("weights.pkl", "state.pt", "arrays/_METADATA", "arrays/_CHECKPOINT_METADATA", "weights.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    np.save(folder / "objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    reseal(folder)


def names_outside(folder: Path) -> None:
    secret = folder.parent.parent / "secret"
    secret.write_text("secret")
    names = {"../../secret": [6, manifest.file_digest(secret)]}
    names["/etc/hostname"] = [1, manifest.file_digest(Path("/etc/hostname"))]
    reseal(folder, lambda m: m["files"].update(names))


def linked_file(folder: Path) -> None:
    path = max(states.files(folder / "arrays"), key=lambda p: p.stat().st_size)
    path.rename(folder.parent.parent / "moved")
    path.symlink_to(folder.parent.parent / "moved")
    reseal(folder)


def linked_folder(folder: Path) -> None:
    (folder / "arrays").rename(folder.parent.parent / "moved")
    (folder / "arrays").symlink_to(folder.parent.parent / "moved")
    reseal(folder)


def linked_checkpoint(folder: Path) -> None:
    folder.rename(folder.parent.parent / "moved")
    folder.symlink_to(folder.parent.parent / "moved")


def pipe(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    os.mkfifo(folder / "weights.safetensors")


def shapes(folder: Path) -> None:
    """Arrays of 2^40 numbers, in the manifest alone."""
    reseal(folder, lambda m: m["leaves"].update({name: [[2**40], "float32", "0"] for name in m["leaves"]}))


def stored_shapes(folder: Path) -> None:
    """The manifest is as it should be, and orbax's own files speak of 2^40 numbers."""
    wanted = manifest.read(folder)["leaves"]
    shutil.rmtree(folder / "arrays")
    import tensorstore

    for name in wanted:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/arrays/", "path": f"{name}/"},
        }
        metadata = {"shape": [2**40], "chunks": [2**30], "dtype": "<f4"}
        tensorstore.open(spec | {"metadata": metadata, "create": True}).result()
    tree = {str((n,)): {"key_metadata": [{"key": n, "key_type": 2}], "value_metadata": _ARRAY} for n in wanted}
    (folder / "arrays" / "_METADATA").write_text(
        json.dumps({"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False})
    )
    reseal(folder)


def missing_chunk(folder: Path) -> None:
    """Orbax answers with an exception that has no class of its own."""
    import tensorstore

    base = {"driver": "file", "path": f"{folder}/arrays/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    name = next(key.decode() for key in store.list().result() if key.endswith(b"params.norm/0"))
    store.delete_range(tensorstore.KvStore.KeyRange(name, name + "\0")).result()
    reseal(folder)


def odd_metadata(folder: Path) -> None:
    """Orbax gives up at once, while it still reads other arrays."""
    next(folder.rglob("array_metadatas/process_0")).write_bytes(b"\xef\xbb\xbf{}")
    reseal(folder)


_ARRAY = {"value_type": "jax.Array", "skip_deserialize": False}


def not_json(folder: Path) -> None:
    (folder / "arrays" / "_METADATA").write_text("[" * 1_000_000)
    reseal(folder)


def large_chunk(folder: Path) -> None:
    """A chunk of [2^25, 4] numbers takes 512 MB, and 119 kB on the disk."""
    import tensorstore

    name = next(n for n in manifest.read(folder)["leaves"] if n.endswith("blocks.0.router"))
    where = {"driver": "ocdbt", "base": f"file://{folder}/arrays/"}
    stored = json.loads(tensorstore.KvStore.open(where).result().read(f"{name}/.zarray").result().value)
    wanted = jax.device_get(states.state(2)["params"]["blocks"][0]["router"])
    rest = {"shape": wanted.shape, "chunks": [2**25, 4], "dtype": stored["dtype"]}
    spec = {"driver": "zarr", "kvstore": where | {"path": f"{name}/"}, "create": True}
    metadata = rest | {"compressor": {"id": "zstd", "level": 1}}
    tensorstore.open(spec | {"metadata": metadata}, delete_existing=True).result().write(wanted).result()
    reseal(folder)


MADE = [
    deep, huge, many, pickles, names_outside, linked_file, linked_folder, linked_checkpoint, pipe, shapes,
    stored_shapes, large_chunk, missing_chunk, odd_metadata, not_json,
]  # fmt: skip


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


def memory(name: str) -> int | None:
    """A value of /proc/self/status, such as VmRSS, in bytes. None where the system has no such file."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return None


def clear_peak() -> bool:
    """Whether the system could forget the peak of the resident memory."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    for step in (1, 2):
        states.save(CheckpointStore(tmp_path), step)
    yield tmp_path
    EXECUTED.clear()


def test_a_read_that_fails_prints_no_traceback(tmp_path: Path, cache: Path) -> None:
    """Threads of orbax and tensorstore fail after the error that is caught, and print what nobody catches."""
    for step in (1, 2):
        odd_metadata(states.save(CheckpointStore(tmp_path), step))
    program = """
import sys, jax
from pathlib import Path
from moe_jax.runs.checkpoint import CheckpointStore
from tests.reliability import runs, states
for _ in range(4):
    CheckpointStore(Path(sys.argv[1])).restore_newest(jax.eval_shape(states.state), lambda _: None)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT, env=runs.environment(cache))
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count("skipped, its arrays cannot be read") == 8


@pytest.mark.skipif(memory("VmHWM") is None, reason="reads the memory in use from /proc")
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_hostile_checkpoints(make: Callable[[Path], None], run: Path, watch: Watch) -> None:
    """Refused with one line, and the one before it restored."""
    make(run / "checkpoints" / "step_00000002")
    said: list[str] = []
    store = CheckpointStore(run, say=said.append)
    target = jax.eval_shape(states.state)
    outside = snapshot(run.parent, run)
    peak = "VmHWM" if clear_peak() else "VmRSS"  # memory that was taken and freed is in the peak alone
    before = memory("VmRSS") or 0
    watch.seen.clear()
    watch.on = True
    try:
        restored = store.restore_newest(target, lambda _: None)
    finally:
        watch.on = False
    grown = (memory(peak) or 0) - before
    assert EXECUTED == []
    assert watch.seen == []
    assert snapshot(run.parent, run) == outside
    assert grown < 256 * 2**20
    assert len(said) >= 1
    assert all("\n" not in line and len(line) < 600 for line in said)
    assert restored is not None
    assert restored[0].step == 1
    assert states.same(restored[1], states.state(1))


def snapshot(folder: Path, without: Path) -> list[tuple[str, int]]:
    """Names and times of what lies beside the run."""
    return [(str(p), p.lstat().st_mtime_ns) for p in sorted(folder.iterdir()) if p != without]
