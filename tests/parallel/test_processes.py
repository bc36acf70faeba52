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
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, restore
from moe_jax.runs.records import read_metrics
from moe_jax.training.programs import Programs
from tests.parallel.pairs import LIMIT, MESH, SETTINGS, Ended, ended, free_job, free_port, pair, slurm, start
from tests.support import saved_run, tuning

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


def test_saved_by_two_and_restored_by_one(folder: Path, two: Ended, tmp_path: Path) -> None:
    """Every process has written parts. One process restores them on eight devices and on one, and saves the same
    digests."""
    assert two.status == (0, 0)
    checkpoint = newest(folder, "two")
    assert {p.name for p in (checkpoint.path / "arrays").glob("ocdbt.*")} == {"ocdbt.process_0", "ocdbt.process_1"}
    for mesh in ("data=8", ""):
        state = restore(checkpoint, state_shapes(folder, mesh))
        again = CheckpointStore(tmp_path / (mesh or "one"))
        again.save(state, checkpoint.step, val_loss=None, elapsed=1.0, context={})
        found = again.list()[-1]
        assert saved_run.array_digests(found) == saved_run.array_digests(checkpoint)
        assert (found.path / "weights.safetensors").read_bytes() == (
            checkpoint.path / "weights.safetensors"
        ).read_bytes()


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


@pytest.mark.slow
def test_two_tasks_of_slurm_as_two_processes(folder: Path, two: Ended) -> None:
    """`--coordinator-address cluster` finds the processes by the variables of SLURM, and trains the same run."""
    assert two.status == (0, 0)
    job = free_job()
    found = ended([start(folder, "tasks", i, 0, env=slurm(job, i), cluster=True) for i in range(2)])
    assert found.status == (0, 0), found.errors
    assert found.printed(1) == []
    assert arrays(folder, "tasks") == arrays(folder, "two")
    assert records(folder, "tasks") == records(folder, "two")


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


@pytest.mark.slow
def test_two_processes_tune_as_one(folder: Path) -> None:
    """`sft --lora` of two processes: the losses of one process with the same mesh, and the frozen weights have the bits
    of the run that is tuned."""
    base, data = tuning.base_run(folder / "base"), tuning.write_conversations(folder / "chats.jsonl")
    words = ["sft", "--run", str(base), "--data", str(data), "--lora", "4", "--steps", "6", "--batch-size", "8"]
    words += ["--eval-every", "6", "--save-every", "6", "--train.log-every", "1", "--precision", "float32"]
    port = free_port()
    found = ended([start(folder, "tuned", index, port, words=words) for index in range(2)])
    assert found.status == (0, 0), found.errors
    assert [*found.lines(0), *found.lines(1)] == []
    argv = [*words[1:], "--out", str(folder / "tuned1"), "--mesh", MESH]
    assert main(lambda given: run_as("sft", given, "sft"), argv) == 0
    losses = [loss for _, loss in records(folder, "tuned")]
    np.testing.assert_allclose(losses, [loss for _, loss in records(folder, "tuned1")], atol=5e-6, rtol=0)
    assert len(losses) == 6
    tuned, before = arrays(folder, "tuned"), arrays(folder, "base/run")
    params = {name: leaf for name, leaf in before.items() if name.startswith("params.")}
    assert {name: tuned[name] for name in params} == params
