"""Runs of `train.py` in processes of their own: a model small enough to train in a second, on sixty sentences."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from tests.support import saved_run

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "python -m moe_jax"
TIMES = frozenset({"tokens_per_second", "wall_seconds"})
"""Fields of a record that are times, and differ between any two runs."""

MODEL = {
    "model.seq_len": 16,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.experts": 4,
    "routing.top_k": 2,
    "model.expert_hidden": 8,
    "routing.capacity_factor": 0.75,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
}
TRAIN = {
    "train.steps": 12,
    "train.batch_size": 4,
    "train.grad_accum": 2,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.save_every": 2,
    "train.muon_lr": 0.02,
    "execution.compute_dtype": "float32",
    "data.tokenizer": "byte",
    "data.eval_tokens": 400,
}


def write_text(path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "ran", "sat", "on", "a", "mat", "and", "then", "it", "was", "happy"]
    path.write_text("\n<|endoftext|>\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(60)))


def flags(text: Path, out: Path, **changes: Any) -> list[str]:
    """The arguments of train.py; `changes` by the field's name, `save_every=3`."""
    values = MODEL | TRAIN | {f"train.{name}": value for name, value in changes.items()}
    return ["--data", str(text), "--out", str(out), *(word for item in values.items() for word in flag(*item))]


def flag(name: str, value: object) -> list[str]:
    """A setting as it is typed, by its SECTION.NAME."""
    long = name.replace("_", "-")
    if isinstance(value, bool):
        head, _, last = long.rpartition(".")
        return [f"--{long}" if value else f"--{head}.no-{last}"]
    return [f"--{long}", str(value)]


def environment(cache: Path) -> dict[str, str]:
    """Of a process: its data are prepared once, and its programs compiled once a test session."""
    return os.environ | {"PYTHONPATH": str(ROOT), "MOE_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}


def start(
    arguments: list[str],
    cache: Path,
    program: str = "train.py",
    output: IO[str] | None = None,
    typed: bool = False,
) -> subprocess.Popen[str]:
    """`output`: where a process that runs for long writes what it prints; a pipe that nobody reads would stop it.
    `typed`: its input is a pipe, which stays open."""
    command = [sys.executable, *(["-m", "moe_jax"] if program == COMMANDS else [str(ROOT / program)]), *arguments]
    out = output or subprocess.PIPE
    typing = subprocess.PIPE if typed else None
    return subprocess.Popen(command, env=environment(cache), stdin=typing, stdout=out, stderr=out, text=True, cwd=cache)


def complete(arguments: list[str], cache: Path, program: str = "train.py") -> subprocess.CompletedProcess[str]:
    process = start(arguments, cache, program)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Commands:
    """One process that runs commands, for tests that need no process of their own: `many_commands.py`."""

    def __init__(self, cache: Path, *options: str) -> None:
        command, pipe = [sys.executable, "-m", "tests.reliability.many_commands", *options], subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=environment(cache), stdin=pipe, stdout=pipe, text=True, cwd=cache.parent
        )

    def run(self, words: list[str], folder: Path, typed: str = "") -> subprocess.CompletedProcess[str]:
        """`words`: what stands after `python` on the command line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([words, str(folder), typed]) + "\n")
        self.process.stdin.flush()
        return subprocess.CompletedProcess(words, *json.loads(self.process.stdout.readline()))

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


def result(run: Path) -> dict[str, Any]:
    """Everything that a finished run must share with an uninterrupted one: the digest of every array of its last
    state, its records, its samples and its summary, without times."""
    newest = saved_run.newest(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "step": newest.step,
        "arrays": saved_run.array_digests(newest),
        "progress": newest.context["progress"],
        "records": [{k: v for k, v in record.items() if k not in TIMES} for record in records],
        "traces": {p.name: p.read_text() for p in (run / "traces").glob("*")},
        "samples": (run / "samples.txt").read_text(),
        "summary": {k: v for k, v in summary.items() if k not in TIMES | {"resumed_from"}},
    }
