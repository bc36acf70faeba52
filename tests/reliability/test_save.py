"""A save that is cut off anywhere, or that the disk refuses, leaves the checkpoints before it or adds itself whole."""

import contextlib
import errno
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import pytest

from moe_jax.config import UserError, holds_run
from moe_jax.runs import arrays, checkpoint, manifest
from moe_jax.runs.arrays import WEIGHTS
from moe_jax.runs.checkpoint import CheckpointStore, verify
from moe_jax.system import files
from tests.reliability import runs, states

pytestmark = pytest.mark.reliability


TRACED = (arrays, checkpoint, files, manifest, shutil)
"""Modules whose lines a kill may hit."""


class Snapshots:
    """A copy of a run's folder before every line of the save that finds it changed: what a kill at that line would
    leave. A tracer, so that the program needs no hooks of its own."""

    def __init__(self, run: Path, scratch: Path) -> None:
        self.run, self.scratch, self.taken = run, scratch, []
        self.lines: set[tuple[str, int]] = set()
        self._last: Any = None

    def _look(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in {m.__file__ for m in TRACED}:
            return None
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
            status = [(str(p), s.st_size, s.st_mtime_ns) for p in sorted(self.run.rglob("*")) for s in [p.lstat()]]
            if status != self._last:
                self._last = status
                self.taken.append(self.scratch / str(len(self.taken)))
                shutil.copytree(self.run, self.taken[-1], copy_function=shutil.copy)
        return self._look

    def __enter__(self) -> "Snapshots":
        sys.settrace(self._look)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)


def survivors(run: Path) -> tuple[int, bool]:
    """The step that a resume gets, and whether it holds exactly what was saved at that step."""
    assert holds_run(run)
    store = CheckpointStore(run, say=lambda _: None)
    found, state = store.restore_newest(jax.eval_shape(states.state), lambda _: None)
    return found.step, states.same(state, states.state(found.step))


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step saved again"])
def test_killed_at_every_line_of_a_save(again: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = CheckpointStore(run)
    for step in (1,) if again else (1, 2, 3):
        states.save(store, step)
    step = 1 if again else 4
    with Snapshots(run, tmp_path / "snapshots") as snapshots:
        states.save(store, step)
    lost = [s for s in snapshots.taken if survivors(s) not in ((step, True), (step - 1, True))]
    assert len(snapshots.taken) > 15
    assert lost == []
    # A resume sweeps up: after one more save nothing but checkpoints is left.
    for snapshot in snapshots.taken[:: max(1, len(snapshots.taken) // 5)]:
        states.save(CheckpointStore(snapshot, say=lambda _: None), 5)
        assert all(p.name.startswith("step_") for p in (snapshot / "checkpoints").iterdir())


STAGES = ["write_arrays", "write_weights", "_sync", "_publish", "_remove_old"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_at_a_stage(stage: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage raises ENOSPC: one line, the earlier step whole, and the next save works."""
    store = CheckpointStore(tmp_path)
    states.save(store, 1)
    owner = checkpoint if hasattr(checkpoint, stage) else CheckpointStore
    original = getattr(owner, stage)

    def failing(*args: Any) -> None:
        if when == "after":
            original(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, stage, failing)
        with pytest.raises((UserError, OSError), match=r"the disk is full|No space"):
            states.save(store, 2)
    step, right = survivors(tmp_path)
    assert right
    assert step in (1, 2)
    states.save(store, 3)
    assert survivors(tmp_path) == (3, True)
    assert all(p.name.startswith("step_") for p in store.folder.iterdir())


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes in `folder`. Skips the test where this process may not mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a tmpfs; the quota tests stand in")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def quota(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(save: Callable[[], object]) -> bool:
    """Whether a save ended with the one line about a full disk or a quota; any other error is a failure of the test."""
    try:
        save()
    except UserError as error:
        causes = ("the disk is full", "a file is larger than `ulimit -f` allows")
        if any(cause in str(error) for cause in causes) and "\n" not in str(error):
            return True
        raise
    return False


def test_quotas_of_twenty_sizes(tmp_path: Path) -> None:
    """Files may not grow beyond a limit. Each limit is below the size of the weights' file, so every save must fail."""
    store = CheckpointStore(tmp_path)
    weights = (states.save(store, 1, size=4096) / WEIGHTS).stat().st_size
    failures = 0
    for i in range(20):
        with quota(max(1, weights * i // 20)):
            failures += refused(lambda i=i: states.save(store, 2 + i, size=4096))
        assert survivors_of_size(store) == 1
        assert not list(store.folder.glob("tmp_*"))
    assert failures == 20
    states.save(store, 30, size=4096)
    assert survivors_of_size(store) == 30


def test_a_thread_that_writes_after_the_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax ends with the first error, while its other threads still write: the draft's folder comes back."""
    store = CheckpointStore(tmp_path)
    states.save(store, 1)
    threads = []

    def write(draft: Path, leaves: Any) -> None:
        late = threading.Timer(0.3, lambda: (draft / "arrays" / "d").mkdir(parents=True))
        late.start()
        threads.append(late)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", write)
    assert refused(lambda: states.save(store, 2))
    threads[0].join()
    assert survivors_of_size(store) == 1
    assert not store.interrupted_saves()


def survivors_of_size(store: CheckpointStore) -> int:
    newest = store.newest()
    assert newest is not None
    assert verify(newest) is None
    return newest.step


def test_training_on_a_full_disk(text: Path, cache: Path, whole: tuple[Path, dict], tmp_path: Path) -> None:
    """The run ends with one line at the save that failed; with more room it goes on to the same bits."""
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in states.files(whole[0] / "checkpoints" / "step_00000012"))
    with small_disk(tmp_path / "disk", 2 * size + size // 2):
        out = tmp_path / "disk" / "run"
        failed = runs.complete(runs.flags(text, out), cache)
        assert failed.returncode == 1
        assert len(failed.stderr.splitlines()) == 1, failed.stderr
        assert "the disk is full" in failed.stderr
        command = ["mount", "-o", f"remount,size={size * 10}", str(tmp_path / "disk")]
        subprocess.run(command, check=True)
        resumed = runs.complete(["--out", str(out), "--resume"], cache)
        assert resumed.returncode == 0, resumed.stderr
        equal = runs.result(out) == whole[1]
    assert equal
