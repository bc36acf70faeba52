"""Signals that ask to stop, at any moment: a good checkpoint of the step in hand, the right status, the same bits."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from moe_jax.runs.catalog import holds_run
from moe_jax.runs.checkpoint import CheckpointStore
from tests.reliability import runs
from tests.support import short_form

pytestmark = pytest.mark.reliability
STEPS = 4000
"""More than are ever reached."""


def logged(out: Path) -> int:
    """The newest step in metrics.jsonl, 0 before the first."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    while process.poll() is None and logged(out) < step:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()


def newest(out: Path) -> int | None:
    return CheckpointStore(out).list()[-1].step if holds_run(out) else None


@pytest.mark.parametrize(("number", "echo"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_the_first_signal_saves_the_step(number: int, echo: bool, text: Path, cache: Path, tmp_path: Path) -> None:
    """An echo is not a second signal: a terminal and `uv run` both pass on one Ctrl-C."""
    out = tmp_path / "run"
    process = runs.start(runs.flags(text, out, steps=STEPS, eval_every=STEPS, save_every=STEPS), cache)
    wait_for_step(process, out, 5)
    process.send_signal(number)
    if echo:
        time.sleep(0.05)
        process.send_signal(number)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "send it again to leave at once" in err
    assert newest(out) == logged(out) >= 5
    assert f"stopped at step {newest(out)}, which is saved" in printed


@pytest.mark.parametrize("seconds", short_form([0.3, 1.0, 2.0, 4.0, 6.0], [4.0]))
def test_ctrl_c_ends_a_command_in_one_line(
    seconds: float, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """`chat` loads and then waits for a line; `export` leaves nothing half."""
    for words in (["chat"], ["export", "--out", str(tmp_path / "exported")]):
        process = runs.start([*words, "--run", str(whole[0])], cache, runs.COMMANDS, typed=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT), err
        if seconds >= 4:  # while Python and jax are imported, Python shows where it was
            assert [line for line in err.splitlines() if line.startswith("error")] in ([], ["error: interrupted"]), err
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("seed", short_form(range(3), [0]))
def test_a_stopped_run_ends_like_one_that_was_not(
    seed: int, text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Stopped at a random moment after the first step: within a step, an evaluation, a sample, or a save."""
    out, moment, status, err = tmp_path / "run", random.Random(seed).uniform(0, 1.5), 0, ""
    for _ in range(8):
        shutil.rmtree(out, ignore_errors=True)
        process = runs.start(runs.flags(text, out), cache)
        wait_for_step(process, out, 1)
        time.sleep(moment)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
        status = process.returncode
        if status == 143:
            break
        moment /= 2  # the run had ended: too late
    assert status == 143, err
    assert newest(out) == logged(out)
    finished = runs.complete([*runs.flags(text, out), "--resume"], cache)
    assert finished.returncode == 0, finished.stderr
    found = runs.result(out)
    assert found == whole[1]


def test_a_second_signal_leaves_at_once(text: Path, cache: Path, tmp_path: Path) -> None:
    """While the first is still at work (its save is held up), the second ends the process; the old step is good."""
    out = tmp_path / "run"
    process = runs.start(
        [*runs.flags(text, out, steps=STEPS, eval_every=STEPS)], cache, "tests/reliability/slow_save.py"
    )
    wait_for_step(process, out, 6)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, err
    assert newest(out) is not None


def test_with_nothing_to_save_the_first_signal_leaves_at_once(text: Path, cache: Path, tmp_path: Path) -> None:
    """Before the first step, while texts and programs are prepared."""
    out = tmp_path / "run"
    process = runs.start(runs.flags(text, out), cache)
    while not (out / ".lock").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, err
    assert newest(out) is None
