"""Standard output and standard error that are closed, full, or read by nobody: training goes on, statuses stay."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs, terminal
from tests.support import short_form

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a POSIX shell and /dev/full"),
]
REDIRECTED = ("<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>&1", ">&-", "2>&-")


def shell(
    redirected: str, arguments: list[str], cache: Path, program: str = "train.py"
) -> subprocess.CompletedProcess[str]:
    """Run a program as a shell would with these redirections."""
    start = [sys.executable, *(["-m", "moe_jax"] if program == runs.COMMANDS else [str(runs.ROOT / program)])]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *start, *arguments],
        capture_output=True,
        text=True,
        cwd=cache,
        env=runs.environment(cache),
        check=False,
    )


@pytest.mark.parametrize("redirected", [">/dev/full 2>&-", pytest.param(">&- 2>/dev/full", marks=pytest.mark.slow)])
def test_training_needs_no_output(
    redirected: str,
    text: Path,
    cache: Path,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Descriptors that are closed or on a full disk: all steps, all files, status 0, and nothing in a wrong file."""
    out = tmp_path / "run"
    finished = shell(redirected, runs.flags(text, out), cache)
    assert finished.returncode == 0, finished.stderr
    assert runs.result(out) == whole[1]


def test_training_outlives_the_reader_of_its_output(
    text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """`train.py 2>&1 | head -1`."""
    out = tmp_path / "run"
    read, write = os.pipe()
    with open(write, "w") as both:
        process = runs.start(runs.flags(text, out), cache, output=both)
    with open(read) as reader:
        reader.readline()
    assert process.wait() == 0
    assert runs.result(out) == whole[1]


@pytest.mark.parametrize("redirected", short_form(REDIRECTED, REDIRECTED[:3]))
def test_a_wrong_flag_has_status_2_whatever_the_output(redirected: str, cache: Path) -> None:
    finished = shell(redirected, ["--steps", "0"], cache)
    assert finished.returncode == 2
    if "2>" not in redirected:
        assert finished.stderr == "error: --steps 0: must be between 1 and 1,000,000,000\n"


def test_a_command_whose_output_cannot_be_written(whole: tuple[Path, dict[str, Any]], cache: Path) -> None:
    full = "error: standard output cannot be written (No space left on device); mend that and try again\n"
    for argv in (["plan", "--help"], ["evaluate", "--run", str(whole[0])]):
        finished = shell(">/dev/full", argv, cache, runs.COMMANDS)
        assert (finished.returncode, finished.stderr) == (1, full)
    assert shell(">&- 2>&-", ["plan", "--help"], cache, runs.COMMANDS).returncode == 0
    assert shell(">&- 2>&-", ["plan", "--no-such-flag"], cache, runs.COMMANDS).returncode == 2


def test_generation_ends_with_its_reader(whole: tuple[Path, dict[str, Any]], cache: Path) -> None:
    """`generate | head -c 1` ends early, with status 0 and without a word."""
    asked = ["generate", "--run", str(whole[0]), "--num-stories", "10000", "--prompt", "the cat"]
    process = runs.start(asked, cache, runs.COMMANDS)
    assert process.stdout is not None
    assert process.stdout.read(1) == "-"
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_control_bytes_do_not_reach_a_terminal(
    whole: tuple[Path, dict[str, Any]], cache: Path, commands: runs.Commands
) -> None:
    """An early model writes any byte. On a terminal they are shown as \\x1b; in a pipe they stay."""
    prompt = "a\x1b]0;title\x07\tb\x9bc\n"
    command = [sys.executable, "-m", "moe_jax", "generate", "--run", str(whole[0]), "--prompt", prompt]
    status, shown = terminal.show(command, cache, stderr=False)
    assert status == 0
    assert b"a\\x1b]0;title\\x07\tb\\x9bc\r\n" in shown
    text = shown.decode().replace("\r\n", "\n")
    assert [c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)] == []
    piped = commands.run(command[1:], cache)
    assert piped.stdout.startswith(prompt)
