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
    found = CheckpointStore(out, say=lambda _: None).newest()
    return None if found is None else found.step


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


COMMANDS = {
    "doctor": [],
    "chat": [],
    "serve": ["--port", "0"],
    "evaluate": [],
    "inspect": ["--out", "report.html"],
    "export": ["--out", "exported"],
}
MOMENTS = [(name, number) for name in COMMANDS for number in range(200)]


@pytest.mark.parametrize(
    ("name", "number"), short_form(MOMENTS, [(n, k) for n, k in MOMENTS if k < 2 or (n == "doctor" and k < 6)])
)
def test_ctrl_c_at_any_moment_is_one_line(
    name: str, number: int, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """While Python starts, jax and numpy are imported, programs compile, or the command works."""
    if name == "serve":
        pytest.importorskip("uvicorn")
    out = [str(tmp_path / word) if word in ("report.html", "exported") else word for word in COMMANDS[name]]
    process = runs.start([name, "--run", str(whole[0]), *out], cache, runs.COMMANDS, typed=True)
    time.sleep(random.Random(f"{name} {number}").uniform(0.1, 6))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT), err
    assert [line for line in err.splitlines() if not line.startswith("loading ")] in ([], ["error: interrupted"]), err
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".partial", ".draft"))]


NIGHT = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGALRM)


@pytest.mark.parametrize("number", short_form([signal.SIGHUP, *NIGHT], [signal.SIGHUP]))
def test_signals_of_schedulers_and_terminals_save_the_step(
    number: int, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may come again and again, as SIGXCPU does every second: only SIGINT and SIGTERM leave without saving."""
    out = tmp_path / "run"
    monkeypatch.setenv("SLOW_SAVE_SECONDS", "2")
    program = "tests/reliability/slow_save.py"
    process = runs.start(runs.flags(text, out, steps=STEPS, eval_every=STEPS), cache, program)
    wait_for_step(process, out, 6)
    process.send_signal(number)
    time.sleep(0.7)
    process.send_signal(number)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"{signal.Signals(number).name}: stopping after this step is saved; SIGTERM leaves at once" in err
    assert newest(out) == logged(out) >= 6
    assert f"stopped at step {newest(out)}, which is saved" in printed


def test_a_hangup_that_was_ignored_stays_ignored(text: Path, cache: Path, tmp_path: Path) -> None:
    """As with `nohup`: training goes on after the terminal is closed."""
    out = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a process inherits it
    try:
        process = runs.start(runs.flags(text, out, steps=40, eval_every=40, save_every=40), cache)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_step(process, out, 3)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert logged(out) == 40


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
        if status != 0:
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
    assert process.returncode == 143
    assert "left at SIGTERM" in err
    assert newest(out) is not None


def test_with_nothing_to_save_the_first_signal_leaves_at_once(text: Path, cache: Path, tmp_path: Path) -> None:
    """While the training step compiles, or before."""
    out = tmp_path / "run"
    process = runs.start(runs.flags(text, out), cache)
    while not (out / ".lock").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert newest(out) is None
    assert "left at SIGTERM; no step was saved, so the same command starts the run again" in err
