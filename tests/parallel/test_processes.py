"""Two processes train one run as one process does, stop together, and lose nothing when one of them dies."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.cli.main import main, run_as
from moe_jax.parallel.layout import mesh_of
from moe_jax.runs.catalog import load_config
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.records import read_metrics
from moe_jax.training.programs import Programs
from tests.parallel.pairs import LIMIT, MESH, SETTINGS, Ended, ended, pair
from tests.support import saved_run

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def two(folder: Path) -> Ended:
    """A whole run of two processes, in the folder `two`."""
    return ended(pair(folder, "two"))


def one(folder: Path, out: str, *flags: str) -> int:
    """The same by one process with eight devices."""
    argv = [*SETTINGS, "--data", str(folder / "text.txt"), "--out", str(folder / out), *flags]
    return main(lambda given: run_as("train", given, "train.py"), argv)


def newest(folder: Path, out: str) -> Checkpoint:
    return saved_run.newest(folder / out)


def arrays(folder: Path, out: str) -> dict[str, str]:
    """The digest of every array of the newest checkpoint."""
    return saved_run.array_digests(newest(folder, out))


def records(folder: Path, out: str) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(folder / out)["train"]]


def state_shapes(folder: Path, mesh: str) -> Any:
    config = load_config(folder / "two")
    assert config is not None
    return Programs.of(config, mesh=mesh_of(mesh)).state_shapes


def test_two_processes_as_one(folder: Path, two: Ended) -> None:
    """Number 8 of the strict list: the losses of 20 steps are those of one process with the same mesh. Process 0 alone
    prints, and no file is written twice."""
    assert two.status == (0, 0), two.errors
    assert one(folder, "one", "--mesh", MESH) == 0
    steps, losses = zip(*records(folder, "two"), strict=True)
    assert steps == tuple(range(1, 21))
    np.testing.assert_allclose(losses, [loss for _, loss in records(folder, "one")], atol=5e-6, rtol=0)
    assert two.printed(1) == []
    assert "best checkpoint: step" in two.out[0]
    assert [*two.lines(0), *two.lines(1)] == []
    names = [{p.name for p in (folder / out).iterdir()} for out in ("two", "one")]
    assert names[0] == names[1]


def test_a_run_moves_from_two_processes_to_one_and_back(folder: Path, two: Ended) -> None:
    """SIGTERM to process 1 saves one step in both. One process goes on, then two again: every step is there once, with
    the losses of the uninterrupted run."""
    assert two.status == (0, 0)
    processes = pair(folder, "moved")
    wait_for_step(folder / "moved", 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    stopped = ended(processes)
    assert stopped.status == (128 + signal.SIGTERM, 128 + signal.SIGTERM), stopped.errors
    saved = newest(folder, "moved").step
    assert f"stopped at step {saved}, which is saved" in stopped.out[0]
    assert saved == records(folder, "moved")[-1][0]
    stop = threading.Thread(target=stop_after, args=(folder / "moved", saved + 4))
    stop.start()
    assert one(folder, "moved", "--mesh", MESH, "--resume") == 128 + signal.SIGTERM
    stop.join()
    assert saved < newest(folder, "moved").step < 20
    again = ended(pair(folder, "moved", "--resume"))
    assert again.status == (0, 0), again.errors
    np.testing.assert_allclose(records(folder, "moved"), records(folder, "two"), atol=5e-6, rtol=0)


def wait_for_step(run: Path, step: int, processes: Sequence[subprocess.Popen[str]] = ()) -> None:
    """Wait until the run has logged a step."""
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_text().count('"train"') < step:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.05)


def stop_after(run: Path, step: int) -> None:
    wait_for_step(run, step)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(folder: Path, two: Ended, victim: int) -> None:
    """Number 9 of the strict list, short form."""
    assert two.status == (0, 0)
    killed_and_resumed(folder, f"killed{victim}", victim, random.Random(victim).randrange(1, 20))


def killed_and_resumed(folder: Path, out: str, victim: int, step: int) -> None:
    """kill -9 of one process after a step. jax ends the other one. The seconds until then are printed.
    Resumed by both, every array of the last state is that of the uninterrupted run."""
    processes = pair(folder, out)
    wait_for_step(folder / out, step, processes)
    processes[victim].kill()
    killed = time.monotonic()
    try:
        processes[1 - victim].wait(timeout=LIMIT)
    finally:
        seconds = time.monotonic() - killed
        found = ended(processes)
    print(f"process {victim} killed after step {step}: the other ended after {seconds:.1f} s with", found.status)
    resumed = ended(pair(folder, out, "--resume"))
    assert resumed.status == (0, 0), resumed.errors
    assert arrays(folder, out) == arrays(folder, "two")
    assert records(folder, out) == records(folder, "two")
    shutil.rmtree(folder / out)


def flipped(path: Path, draw: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_two_processes_resume_from_the_checkpoint_before_a_flipped_bit(folder: Path, two: Ended) -> None:
    """Both skip the damaged checkpoint, and one of them renames it. The steps after the other one are taken again, with
    the same bits."""
    assert two.status == (0, 0)
    shutil.copytree(folder / "two", folder / "damaged")
    checkpoint = newest(folder, "damaged")
    part = max((checkpoint.path / "arrays" / "ocdbt.process_1").rglob("d/*"), key=lambda p: p.stat().st_size)
    flipped(part, random.Random(0))
    again = ended(pair(folder, "damaged", "--resume"))
    assert again.status == (0, 0), again.errors
    (line,) = again.lines(0)
    assert line.startswith(f"{checkpoint.path}: skipped, arrays/ocdbt.process_1/d/")
    assert again.lines(1) == []
    assert f"resumed at step {checkpoint.step - 4}" in again.out[0]
    assert arrays(folder, "damaged") == arrays(folder, "two")
    assert [p.name for p in (folder / "damaged" / "checkpoints").glob("damaged_*")] == ["damaged_00000020"]
