"""Runs of two processes with four simulated devices each, on loopback."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.reliability import runs
from tests.support.programs import QUICK_COMPILER

WORKER = Path(__file__).parent / "worker.py"
MESH = "fsdp=2,expert=4"
SETTINGS = """
    --tokenizer byte --model.layers 1 --model.width 32 --model.heads 2 --model.expert-hidden 32 --seq-len 32
    --experts 8 --batch-size 8 --data.eval-tokens 400 --eval-every 8 --save-every 4 --steps 20
    --train.log-every 1
    --precision float32 --model.dropout 0.1 --optimizer adamw --lr 1e-3 --train.warmup-steps 0
""".split()  # noqa: SIM905, a list would hide the pairs of flag and value
LIMIT = 240.0
"""Seconds after which a pair counts as hanging."""


class Ended(NamedTuple):
    """How the two processes ended, process 0 first."""

    status: tuple[int, int]
    out: tuple[str, str]
    errors: tuple[str, str]

    def printed(self, process: int) -> list[str]:
        """The lines of stdout without those of gloo, which connects processes on CPUs. Its threads mix their lines."""
        gloo = r"\[Gloo\] Rank|[\s\d]+is connected to|\d+ peer ranks\.|Expected number of.*"
        mine = re.sub(gloo, "", self.out[process])
        return [line for line in mine.splitlines() if line.strip()]

    def lines(self, process: int) -> list[str]:
        """The lines of stderr."""
        return [line for line in self.errors[process].splitlines() if not line.startswith("tokenizing ")]


def free_port() -> int:
    with socket.socket() as listen:
        listen.bind(("127.0.0.1", 0))
        return listen.getsockname()[1]


def start(
    folder: Path,
    out: str,
    index: int,
    port: int,
    *flags: str,
    cwd: str = "",
    cluster: bool = False,
) -> subprocess.Popen[str]:
    """Process `index` of two. `folder` holds text.txt and the cache of data and programs. `cwd` is a folder in it.

    With `cluster`, JAX is to find the processes by the variables of a cluster, which are not there.
    """
    command = [sys.executable, str(WORKER), *SETTINGS, "--data", str(folder / "text.txt")]
    command += ["--out", str(folder / out), "--mesh", MESH, *flags]
    named = ["--num-processes", "2", "--process-id", str(index), "--coordinator-address", f"127.0.0.1:{port}"]
    command += ["--coordinator-address", "cluster"] if cluster else named
    values = runs.environment(folder / "cache")
    # jaxlib 0.12.1: two CPU processes that read a program with collectives from the cache wait for each other for ever.
    values["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    values["TF_CPP_MIN_LOG_LEVEL"] = "2"  # XLA warns at every start of several processes
    values["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {QUICK_COMPILER}"
    return subprocess.Popen(
        command,
        env=_without_cluster({**os.environ, **values}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder / cwd,
    )


def _without_cluster(values: Mapping[str, str]) -> dict[str, str]:
    """The environment without what JAX takes for a cluster."""
    found = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR_")
    return {name: value for name, value in values.items() if not name.startswith(found)}


def pair(folder: Path, out: str, *flags: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [start(folder, out, index, port, *flags) for index in range(2)]


def ended(processes: list[subprocess.Popen[str]]) -> Ended:
    """Wait for both. Nothing is left of them if one hangs."""
    try:
        texts = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    (out_0, errors_0), (out_1, errors_1) = texts
    status = (processes[0].returncode, processes[1].returncode)
    return Ended(status, (out_0, out_1), (errors_0, errors_1))
