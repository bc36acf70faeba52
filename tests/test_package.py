"""The wheel, installed into an empty environment: it trains, and every command is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli.main import COMMANDS

pytestmark = pytest.mark.package
ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """The output of a program that must succeed. PYTHONPATH is not set, so that the checkout cannot be imported."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`moe-jax` in an environment with only the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    run("uv", "build", "--wheel", "--quiet", "--out-dir", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    run("uv", "venv", "--quiet", "--python", sys.executable, folder / "bare", cwd=folder)
    run("uv", "pip", "install", "--quiet", "--python", folder / "bare", wheel, cwd=folder)
    return folder / "bare" / "bin" / "moe-jax"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_there(program: Path, command: str) -> None:
    assert command in run(program, command, "--help", cwd=program.parent)


def test_the_wheel_trains_and_tells_and_inspects(program: Path, tmp_path: Path) -> None:
    """Without a checkout, the package has all the files that it needs, the page of the report included."""
    assert list((program.parents[1] / "lib").rglob("moe_jax/py.typed"))
    small = ["--model.layers=1", "--model.width=32", "--seq-len=64", "--batch-size=2", "--data.stories=200"]
    cache = {"MOE_JAX_CACHE": str(tmp_path / "cache")}
    run(program, "train", *small, "--steps=3", "--out", "run", cwd=tmp_path, **cache)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    told = run(program, "generate", "--run", "run", "--prompt", "Once", "--max-tokens", "5", cwd=tmp_path, **cache)
    assert told.startswith("Once")
    assert (tmp_path / "run" / "report" / "routing.html").stat().st_size > 10_000


def test_the_wheel_has_its_models(program: Path, tmp_path: Path) -> None:
    """The first words of a newcomer, in an empty folder."""
    cache = {"MOE_JAX_CACHE": str(tmp_path / "cache")}
    start = "Once upon a time"
    told = run(program, "generate", "--prompt", start, "--max-tokens", "20", cwd=tmp_path, **cache)
    assert told.startswith(start)
    assert len(told.split()) > 10
    listed = [line.split()[0] for line in run(program, "runs", cwd=tmp_path).splitlines()[1:]]
    assert sorted(listed) == ["nano", "nano-chat", "stories"]
