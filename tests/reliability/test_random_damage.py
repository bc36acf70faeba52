"""Random damage to a file of a run: each command says it in one line, or uses a whole checkpoint.

A case is a function of its number, so one that fails can be repeated alone.
"""

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moe_jax.data.synthetic.stories import write_chats
from tests.reliability import runs
from tests.support import short_form

pytestmark = pytest.mark.reliability
MANY = 500
COMMANDS = {
    "evaluate": [],
    "chat": ["--max-tokens", "4"],
    "serve": ["--port", "0"],
    "export": ["--out", "out"],
    "quantize": ["--to", "int8", "--out", "out"],
    "sft": ["--data", "chats.jsonl", "--out", "out", "--steps", "1", "--lora", "2"],
    "certify": [],
}
CASES = [(name, k) for name in COMMANDS for k in range(MANY)]
BY_DAY = {"evaluate": 5, "serve": 1, "sft": 1, "certify": 1}
KINDS = ("flip a bit", "cut", "empty", "remove", "put another file in its place")


def damage(run: Path, number: int) -> str:
    """Damage one file of a run: of a checkpoint for even numbers, else one beside it. Returns what was done."""
    rng, kind = random.Random(number), KINDS[number % len(KINDS)]
    inside = (path for path in run.rglob("*") if "report" not in path.parts)  # only people read the report
    files = sorted(path for path in inside if path.is_file() and path.stat().st_size)
    path = rng.choice([path for path in files if ("checkpoints" in path.parts) == (number % 2 == 0)])
    content = path.read_bytes()
    at = rng.randrange(len(content))
    if kind == "flip a bit":
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[:at])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "remove":
        path.unlink()
    else:
        shutil.copyfile(rng.choice([other for other in files if other != path]), path)
    return f"{path.relative_to(run)}: {kind} at {at} of {len(content)}"


def score(printed: str) -> float:
    """The loss that `evaluate` has printed."""
    return json.loads(printed.splitlines()[-1])["val_loss"]


@pytest.fixture(scope="module")
def expected(whole: tuple[Path, dict[str, Any]], commands: runs.Commands) -> set[float]:
    """The losses of all checkpoints of the whole run. They differ."""
    steps = [int(path.name.removeprefix("step_")) for path in (whole[0] / "checkpoints").glob("step_*")]
    argv = [["-m", "moe_jax", "evaluate", "--run", str(whole[0]), "--step", str(step)] for step in steps]
    losses = {score(commands.run(words, whole[0]).stdout) for words in argv}
    assert len(losses) == len(steps)
    return losses


def serve(words: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """A server that is stopped once it listens."""
    process = runs.start(words, cache, runs.COMMANDS)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready: "):
            process.terminate()
    _, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, "", err)


@pytest.mark.parametrize(("name", "number"), short_form(CASES, [(n, k) for n, k in CASES if k < BY_DAY.get(n, 2)]))
def test_random_damage(
    name: str,
    number: int,
    whole: tuple[Path, dict[str, Any]],
    expected: set[float],
    commands: runs.Commands,
    cache: Path,
    tmp_path: Path,
) -> None:
    if name == "serve":
        pytest.importorskip("uvicorn")
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    write_chats(tmp_path / "chats.jsonl", 30)
    done = damage(run, number)
    words = [name, "--run", str(run), *COMMANDS[name]]
    if name == "serve":
        ended = serve(words, cache)
    else:
        ended = commands.run(["-m", "moe_jax", *words], tmp_path, "the cat\n")
    told = f"{done}: status {ended.returncode}\n{ended.stdout}{ended.stderr}"
    assert "Traceback" not in ended.stdout + ended.stderr, told
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode in (0, 1, 2), told
    assert len(errors) == (ended.returncode != 0), told
    if name == "evaluate" and ended.returncode == 0 and "config.json" not in done:
        assert score(ended.stdout) in expected, told  # a digit of a setting that was changed may be a setting
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".partial", ".draft"))]
