"""A save that is cut off anywhere, or that the disk refuses, leaves the checkpoints before it or adds itself whole."""

import contextlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint
import pytest

from moe_jax import runs as package
from moe_jax.config import UserError
from moe_jax.runs.arrays import WEIGHTS
from moe_jax.runs.catalog import holds_run
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.system import files
from tests.reliability import runs, states
from tests.support import saved_run

pytestmark = pytest.mark.reliability

TRACED = tuple(str(Path(str(module.__file__)).parent) for module in (package, files, orbax.checkpoint, shutil))
"""Folders of modules whose lines a kill may hit. The threads of tensorstore are not among them: what they write has a
temporary name."""


class Snapshots:
    """A copy of a run's folder before every line of the save that finds it changed: what a kill at that line would
    leave. A tracer, so that the program needs no hooks of its own."""

    def __init__(self, run: Path, scratch: Path) -> None:
        self.run, self.scratch, self.taken = run, scratch, []
        self._last: Any = None

    def _look(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line":
            # Tensorstore's threads rename and remove files while we look: the next line looks again.
            with contextlib.suppress(FileNotFoundError, shutil.Error):
                status = [(str(p), s.st_size, s.st_mtime_ns) for p in sorted(self.run.rglob("*")) for s in [p.lstat()]]
                if status != self._last:
                    copy = self.scratch / str(len(self.taken))
                    shutil.rmtree(copy, ignore_errors=True)  # of a look that a thread interrupted
                    shutil.copytree(self.run, copy, copy_function=shutil.copy)
                    self.taken.append(copy)
                    self._last = status
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
    restored = store.restore_newest(jax.eval_shape(states.state), lambda _: None)
    assert restored is not None
    return restored[0].step, states.same(restored[1], states.state(restored[0].step))


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
    assert len(snapshots.taken) > (2 if again else 15)
    assert lost == []
    # The next save sweeps up: nothing but checkpoints is left.
    for snapshot in snapshots.taken[:: max(1, len(snapshots.taken) // 5)]:
        states.save(CheckpointStore(snapshot, say=lambda _: None), 5)
        assert all(p.name.startswith("step_") for p in (snapshot / "checkpoints").iterdir())
        assert survivors(snapshot) == (5, True)


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
    """Files may not grow beyond a limit: in the weights, in orbax's files, in the manifest. Each save fails, and the
    earlier one stays."""
    store = CheckpointStore(tmp_path)
    weights = (states.save(store, 1, size=4096) / WEIGHTS).stat().st_size
    for i in range(20):
        with quota(max(1, weights * i // 20)):
            assert refused(lambda i=i: states.save(store, 2 + i, size=4096))
        assert saved_run.newest(tmp_path).step == 1
        assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]
    states.save(store, 30, size=4096)
    assert saved_run.newest(tmp_path).step == 30


def test_training_on_a_full_disk(text: Path, cache: Path, whole: tuple[Path, dict], tmp_path: Path) -> None:
    """The run ends with one line at the save that failed; with more room it goes on to the same bits."""
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in states.files(whole[0] / "checkpoints" / "step_00000012"))
    with small_disk(tmp_path / "disk", 2 * size + size // 2):
        out = tmp_path / "disk" / "run"
        failed = runs.complete(runs.flags(text, out), cache)
        assert failed.returncode == 1
        assert failed.stderr.splitlines()[-1].startswith("error: "), failed.stderr
        assert "the disk is full" in failed.stderr
        command = ["mount", "-o", f"remount,size={size * 10}", str(tmp_path / "disk")]
        subprocess.run(command, check=True)
        resumed = runs.complete(["--out", str(out), "--resume"], cache)
        assert resumed.returncode == 0, resumed.stderr
        equal = runs.result(out) == whole[1]
    assert equal
