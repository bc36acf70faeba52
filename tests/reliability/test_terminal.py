"""Every command on a terminal of 80 columns: no line is wider, and something is shown before the work is done."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.reliability import runs, terminal

pytestmark = pytest.mark.reliability

ARGUMENTS = {
    "generate": ["--prompt", "Once upon a time a dragon met a cat", "--max-tokens", "60"],
    "evaluate": [],
    "inspect": [],
    "doctor": [],
    "plot": [],
    "export": ["--out", "exported"],
}
"""Commands that open a run, with what they need beside it."""
FIRST_SIGN = {
    "generate": "loading",
    "evaluate": "loading",
    "inspect": "routing a text",
    "doctor": "reading every checkpoint",
    "plot": "drawing",
    "export": "exporting",
    "certify": "loading",
    "presets": "measuring",
    "plan": "counting the tokens",
    "chat": "loading",
    "train": "starting JAX",
}
"""What a command says first, before it imports JAX."""
UNBROKEN = re.compile(r"(next: )?uv run ")
"""Commands to copy are never broken, nor is a word that is longer than a line, such as a path."""


def check(name: str, shown: bytes) -> None:
    lines = terminal.lines(shown)
    assert any(line.strip() for line in lines)
    wide = [line for line in lines if cell_len(line) > terminal.COLUMNS and " " in line.strip()]
    assert [line for line in wide if not UNBROKEN.match(line)] == []
    if name in FIRST_SIGN:
        first = next(line for line in lines if line.strip())
        assert FIRST_SIGN[name] in first


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_command_that_opens_a_run(name: str, whole: tuple[Path, dict], cache: Path) -> None:
    command = [sys.executable, "-m", "moe_jax", name, "--run", str(whole[0]), *ARGUMENTS[name]]
    status, shown = terminal.show(command, cache)
    assert status == 0
    check(name, shown)


def test_chat_answers_and_leaves(whole: tuple[Path, dict], cache: Path) -> None:
    command = [sys.executable, "-m", "moe_jax", "chat", "--run", str(whole[0]), "--max-tokens", "40"]
    typed = ["the cat sat", "/experts 0", "/temp 0.5", "the dog", "/nothing", "/help", "/quit"]
    status, shown = terminal.show(command, cache, typed)
    assert status == 0
    check("chat", shown)
    text = "\n".join(terminal.lines(shown))
    for said in ("/help lists the commands", "try: ", "layer 0 of 0 to 0", "temperature 0.5", "no such command"):
        assert said in text
    assert text.count("the dog") == 2  # typed and continued; the colours show the last tokens only
    assert "(the last 15 tokens" in text
    assert b"\x1b[3" in shown


def test_chat_in_a_pipe_answers_each_line_and_nothing_else(whole: tuple[Path, dict], cache: Path) -> None:
    command = [sys.executable, "-m", "moe_jax", "chat", "--run", str(whole[0]), "--max-tokens", "5"]
    answer = {"cwd": cache, "env": runs.environment(cache), "capture_output": True, "text": True, "check": False}
    found = subprocess.run(command, input="the cat\nthe dog\n", **answer)
    assert (found.returncode, found.stderr) == (0, "")
    one = subprocess.run(command, input="the cat\n", **answer).stdout
    assert one.startswith("the cat")
    assert found.stdout.startswith(one + "the dog")


@pytest.mark.parametrize(
    ("name", "arguments"), [("presets", []), ("plan", ["--memory", "8GB"]), ("certify", ["--preset", "nano"])]
)
def test_a_command_without_a_run(name: str, arguments: list[str], cache: Path) -> None:
    status, shown = terminal.show([sys.executable, "-m", "moe_jax", name, *arguments], cache)
    assert status == 0
    check(name, shown)


def test_training(text: Path, cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(runs.ROOT / "train.py"), *runs.flags(text, tmp_path / "run")]
    status, shown = terminal.show(command, cache)
    assert status == 0
    check("train", shown)
