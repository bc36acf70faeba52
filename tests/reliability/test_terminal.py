"""Every command on a terminal of 80 columns: no line is wider, and something is shown before the work is done."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.reliability import runs, terminal

pytestmark = pytest.mark.reliability

FIRST_SIGN = {
    "generate": "loading",
    "evaluate": "loading",
    "inspect": "routing a text",
    "doctor": "reading every checkpoint",
    "plot": "drawing",
    "export": "exporting",
    "certify": "loading",
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


IN_TURN = """
import json, sys
from tests.reliability.many_commands import run
for words in json.loads(sys.argv[1]):
    print("the command:", words[2], flush=True)
    assert run(words) == 0
"""


@pytest.fixture(scope="module")
def shown(
    whole: tuple[Path, dict], text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Command -> what it has shown. One process in one terminal runs all of them, one after the other."""
    out = tmp_path_factory.mktemp("terminal")
    commands = {
        "generate": ["--prompt", "Once upon a time a dragon met a cat", "--max-tokens", "60"],
        "evaluate": [],
        "inspect": [],
        "doctor": [],
        "export": ["--out", "exported"],
        "certify": [],
    }
    if importlib.util.find_spec("matplotlib"):
        commands["plot"] = []
    argv = [["-m", "moe_jax", name, "--run", str(whole[0]), *more] for name, more in commands.items()]
    argv += [["-m", "moe_jax", "train", *runs.flags(text, out / "run")]]
    status, said = terminal.show([sys.executable, "-c", IN_TURN, json.dumps(argv)], cache)
    assert status == 0, said[-2000:].decode()
    parts = [part.partition(b"\r\n") for part in said.split(b"the command: ")[1:]]
    return {name.decode(): after for name, _, after in parts}


def test_every_command(shown: dict[str, bytes]) -> None:
    assert len(shown) >= 7
    for name, said in shown.items():
        check(name, said)


def test_chat_answers_and_leaves(whole: tuple[Path, dict], cache: Path) -> None:
    command = [sys.executable, "-m", "moe_jax", "chat", "--run", str(whole[0]), "--max-tokens", "40"]
    typed = ["the cat sat", "/temp 0.5", "the dog", "/nothing", "/help", "/quit"]
    status, shown = terminal.show(command, cache, typed)
    assert status == 0
    check("chat", shown)
    text = "\n".join(terminal.lines(shown))
    for said in ("/help lists the commands", "try: ", "temperature 0.5", "no such command"):
        assert said in text
    assert text.count("the dog") == 2  # typed and continued


def test_chat_in_a_pipe_answers_each_line_and_nothing_else(whole: tuple[Path, dict], commands: runs.Commands) -> None:
    command = ["-m", "moe_jax", "chat", "--run", str(whole[0]), "--max-tokens", "5"]
    both = commands.run(command, whole[0], "the cat\nthe dog\n")
    assert (both.returncode, both.stderr) == (0, "")
    one = commands.run(command, whole[0], "the cat\n").stdout
    assert one.startswith("the cat")
    assert both.stdout.startswith(one + "the dog")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf_8_is_refused_and_the_next_one_answered(
    errors: str, whole: tuple[Path, dict], cache: Path
) -> None:
    command = [sys.executable, "-m", "moe_jax", "chat", "--run", str(whole[0]), "--max-tokens", "4"]
    environment = runs.environment(cache) | {"PYTHONIOENCODING": f"utf-8:{errors}"}
    typed = b"the cat\nthe \xff dog\nthe dog\n"
    ended = subprocess.run(command, input=typed, env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.startswith(b"the cat")
    assert b"\nthe text is not UTF-8 at character 4; give it in UTF-8\nthe dog" in ended.stdout
