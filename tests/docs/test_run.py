"""Every line of code in README and docs is run, on a tiny run that stands for the real one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import COMMAND_LINES, PAGES, Block, blocks, words_of
from tests.reliability import runs

pytestmark = pytest.mark.reliability

NOT_RUN = {
    "--extra gpu-plan": "needs the extra gpu-plan; tests/planning runs it",
    "--extra gguf": "needs the package gguf; tests/interop runs it",
    "--extra peers": "needs PyTorch; tests/peers runs it",
    "pytest": "is what runs this",
    "python -m foundation": "takes minutes; tests/foundation runs the same checks",
    "moe_jax serve": "does not end by itself; tests/reliability/test_serve.py runs it",
    "certify --mesh": "needs eight devices; tests/parallel tests the same claims",
    "--num-processes": "needs a second process; tests/parallel/test_processes.py runs two",
    "benchmark.py": "takes minutes; tests/benchmarks runs each suite on a tiny model",
    "verify-resume": "takes a minute; tests/reliability/test_verify_resume.py runs it",
    "--run runs/book": "opens the run that the line above it trains; the same command is run on runs/nano",
    "plan --preset seed-158m --verify": "needs an NVIDIA card",
    "--resume": "resumes the real run; tests/reliability/test_kills.py resumes tiny ones",
    "--upcycle": "trains for minutes; tests/training/test_upcycle.py does it on a tiny model",
}
"""Part of a command line -> why it is only parsed (`test_pages.py`), and not run."""

PYTHON = [block for page in PAGES for block in blocks(page) if block.kind == "python"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(words: list[str], place: Path, cache: Path) -> str:
    """What a command prints. It must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env=runs.environment(cache),
        input="A cat\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", PYTHON, ids=[f"{b.page}-{i}" for i, b in enumerate(PYTHON)])
def test_python(block: Block, workplace: Path, cache: Path) -> None:
    assert run(["-c", block.code], workplace, cache).strip()


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if not any(part in line for part in NOT_RUN)])
def test_command(line: str, workplace: Path, cache: Path, tmp_path: Path) -> None:
    """A command on a run is run whole. Training is run as `--dry-run`, where the settings are resolved and sized."""
    words = words_of(line)
    if words[0] == "train.py":
        place = workplace if COMMAND_LINES[line] else tmp_path
        assert "dry run" in run([str(runs.ROOT / "train.py"), *words[1:], "--dry-run"], place, cache)
    else:
        script = [str(runs.ROOT / words[1])] if words[1].startswith("benchmarks/") else words[1:2]
        assert run([*script, *words[2:]], workplace, cache).strip()


def test_each_reason_is_needed() -> None:
    for part in NOT_RUN:
        assert any(part in line for line in COMMAND_LINES), part
