"""Every command at its work, with standard output and standard error closed, full, or a pipe that nobody reads.

No traceback, the right status, and the work is done where a file is the point of it.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe_jax.cli.command import COMMANDS
from moe_jax.system.environment import has_cuda_plugin
from tests.reliability import runs
from tests.reliability.figures import Record, figure
from tests.support import tuning

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a POSIX shell and /dev/full"),
]
PROGRAM = "tests/reliability/tiny_presets.py"
KINDS = ("closed", "full", "pipe")
BROKEN = [*((kind, "") for kind in KINDS), *(("", kind) for kind in KINDS), *((kind, kind) for kind in KINDS)]
"""(standard output, standard error): what is wrong with it, "" where nothing is."""


def chats(text: Path) -> Path:
    """Conversations, beside the text."""
    path = text.with_name("chats.jsonl")
    return path if path.exists() else tuning.write_conversations(path)


@functools.cache
def adapted(run: Path, text: Path) -> Path:
    """A run with adapters, which `merge` adds to its weights."""
    out = text.with_name("adapted")
    command = [sys.executable, "-m", "moe_jax", *tuned(run, text), "--lora", "1", "--out", str(out)]
    subprocess.run(command, env=runs.environment(text.parent), cwd=text.parent, check=True, capture_output=True)
    return out


def tuned(run: Path, text: Path) -> list[str]:
    return ["sft", "--run", str(run), "--data", str(chats(text)), "--steps", "2", "--batch-size", "2"]


class Case(NamedTuple):
    """A command at its work."""

    argv: Callable[[Path, Path], list[str]]
    """From the folder of a run, and a text. The command runs in a folder of its own."""
    leaves: str = ""
    """A pattern of what it writes there, where that is the point of it."""
    outlives: bool = False
    """Whether it goes on to its end, with status 0, without its output."""
    slow: bool = False
    status: int = 0
    typed: str = ""
    """What it reads."""


# A server never ends by itself, so this one cannot listen: the address is one for documentation (RFC 5737).
CASES = {
    "train": Case(lambda run, text: runs.flags(text, Path("out")), "out/report/*.html", outlives=True),
    "sft": Case(lambda run, text: [*tuned(run, text)[1:], "--out", "out"], "out/report/*.html", outlives=True),
    "merge": Case(lambda run, text: ["--run", str(adapted(run, text)), "--out", "out"], "out/config.json"),
    "quantize": Case(lambda run, text: ["--run", str(run), "--to", "int4", "--out", "out"], "out/config.json"),
    "generate": Case(lambda run, text: ["--run", str(run), "--max-tokens", "5"]),
    "evaluate": Case(lambda run, text: ["--run", str(run)]),
    "inspect": Case(lambda run, text: ["--run", str(run), "--out", "page.html"], "page.html"),
    "plan": Case(lambda run, text: ["--preset", "nano"], slow=has_cuda_plugin(), status=0 if has_cuda_plugin() else 1),
    "doctor": Case(lambda run, text: ["--run", str(run)]),
    "verify-resume": Case(lambda run, text: runs.flags(text, Path("unused")), slow=True),
    "certify": Case(lambda run, text: ["--run", str(run)]),
    "plot": Case(lambda run, text: ["--run", str(run), "--out", "pictures"], "pictures/*.svg"),
    "benchmark": Case(
        lambda run, text: ["moe", "--preset", "nano", "--rounds", "1", "--batch-size", "1"],
        "runs/bench/*.json",
        outlives=True,
    ),
    "chat": Case(lambda run, text: ["--run", str(run), "--max-tokens", "5"], typed="the cat\n"),
    "serve": Case(lambda run, text: ["--run", str(run), "--host", "203.0.113.1", "--api-key", "k"], status=1),
    "presets": Case(lambda run, text: []),
    "export": Case(lambda run, text: ["--run", str(run), "--out", "out"], "out/model.safetensors"),
    "completion": Case(lambda run, text: ["bash"]),
}


def run_broken(
    argv: list[str], broken: tuple[str, str], folder: Path, values: dict[str, str], typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with broken streams. Streams that are whole are read."""
    read, write = os.pipe()
    os.close(read)
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    redirected = ""
    for number, (name, kind) in enumerate(zip(given, broken, strict=True), start=1):
        if kind == "pipe":
            given[name] = write
        redirected += {"closed": f" {number}>&-", "full": f" {number}>/dev/full"}.get(kind, "")
    start = ["sh", "-c", f'exec "$@"{redirected}', "sh", sys.executable, str(runs.ROOT / PROGRAM), *argv]
    try:
        return subprocess.run(
            start, **given, text=True, errors="replace", input=typed, cwd=folder, env=values, check=False
        )
    finally:
        os.close(write)


def check(name: str, broken: tuple[str, str], run: Path, text: Path, cache: Path, folder: Path, record: Record) -> None:
    case = CASES[name]
    values = runs.environment(cache) | {
        "MOE_JAX_TINY_TEXT": str(text),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TMPDIR": str(folder),
    }
    finished = run_broken([name, *case.argv(run, text)], broken, folder, values, case.typed)
    said = f"{finished.stdout or ''}\n{finished.stderr or ''}"
    lost = broken[0] == "full" and not case.outlives and not case.status
    assert "Traceback" not in said, said
    ended = broken[0] == "pipe" and not case.outlives  # as `| head` ends a command, with status 0
    assert finished.returncode in ({0, case.status} if ended else {1 if lost else case.status}), said
    if lost and not broken[1]:
        assert "error: standard output cannot be written (No space left on device)" in said
    if case.leaves:
        assert list(folder.glob(case.leaves)), f"{name} wrote nothing: {sorted(folder.rglob('*'))}; {said}"
    figure(record, "commands at their work with broken streams", 1)


def test_there_is_a_case_for_every_command() -> None:
    assert set(CASES) == set(COMMANDS)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.slow])
def test_a_broken_stream(
    name: str, whole: tuple[Path, dict[str, Any]], text: Path, cache: Path, tmp_path: Path, record_property: Record
) -> None:
    """Each command with one of the ways, in turn."""
    broken = BROKEN[list(CASES).index(name) % len(BROKEN)]
    check(name, broken, whole[0], text, cache, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", BROKEN, ids=lambda b: " and ".join(filter(None, b)) if b[0] == b[1] else f"{b[0]}-{b[1]}"
)
@pytest.mark.parametrize("name", CASES)
def test_all_broken_streams(
    name: str,
    broken: tuple[str, str],
    whole: tuple[Path, dict[str, Any]],
    text: Path,
    cache: Path,
    tmp_path: Path,
    record_property: Record,
) -> None:
    check(name, broken, whole[0], text, cache, tmp_path, record_property)
