"""Processes that find each other, or say in one line why they do not."""

import socket
from pathlib import Path

import pytest

from moe_jax.cli.main import main, run_as
from tests.parallel.pairs import ended, free_port, start
from tests.support import saved_run

pytestmark = pytest.mark.parallel


def test_no_cluster(folder: Path) -> None:
    """One line and status 1."""
    process = start(folder, "none", 0, 0, cluster=True)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert errors.startswith("error: --coordinator-address cluster: JAX cannot connect the processes (")
    assert "start it by srun or mpirun, or give --num-processes" in errors
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("flags", "data", "expected"),
    [
        (("--lr", "2e-3"), "", "--lr: 0.002 in process 1, and 0.001 in process 0; "),
        pytest.param((), "other.txt", "--data ", marks=pytest.mark.slow),
    ],
    ids=["settings", "data"],
)
def test_processes_that_differ_are_refused(folder: Path, flags: tuple[str, ...], data: str, expected: str) -> None:
    """Both end with status 2 and the same line, and nothing is left of the run."""
    if data:  # each process finds its own text under the same name
        (folder / "own").mkdir()
        (folder / "own" / "text.txt").write_text("<|endoftext|>".join(f"{saved_run.STORY}{-i}" for i in range(80)))
    port = free_port()
    processes = [start(folder, "refused", 0, port, "--data", "text.txt")]
    processes.append(start(folder, "refused", 1, port, "--data", "text.txt", *flags, cwd=data and "own"))
    found = ended(processes)
    assert found.status == (2, 2), found.errors
    assert found.lines(0) == found.lines(1)
    assert len(found.lines(0)) == 1
    assert found.lines(0)[0].startswith(f"error: {expected}")
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--mesh data=8 --num-processes 2 --process-id 2 --coordinator-address h:1",
            "--process-id 2: must be between 0",
        ),
        (
            "--mesh data=8 --coordinator-address cluster --num-processes 2",
            "--coordinator-address cluster: must be given alone, since the cluster says",
        ),
        ("--num-processes 2 --process-id 0 --coordinator-address h:1", "--num-processes: needs --mesh"),
    ],
)
def test_flags_that_name_no_group(flags: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--out", str(tmp_path / "run"), *flags.split()]
    assert main(lambda given: run_as("train", given, "train.py"), argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_port_that_is_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        process = start(folder, "port", 0, port)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    named = f"error: --coordinator-address 127.0.0.1:{port}: "
    assert errors == f"{named}process 0 cannot listen there (Address already in use); name a free port\n"
