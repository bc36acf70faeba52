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
from tests.reliability.figures import Record, figure

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_the_step(
    number: int, text: Path, cache: Path, tmp_path: Path, record_property: Record
) -> None:
    out = tmp_path / "run"
    process = runs.start(runs.flags(text, out, steps=STEPS, eval_every=STEPS, save_every=STEPS), cache)
    wait_for_step(process, out, 5)
    begin = time.monotonic()
    process.send_signal(number)
    printed, err = process.communicate(timeout=60)
    seconds = time.monotonic() - begin
    assert process.returncode == 128 + number, err
    assert "send it again to leave at once" in err
    assert newest(out) == logged(out) >= 5
    assert f"stopped at step {newest(out)}, which is saved" in printed
    figure(record_property, "signals answered with a checkpoint of the step in hand", 1)
    figure(record_property, "signals answered after more than 10 s", int(seconds > 10))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGALRM])
def test_signals_of_schedulers_and_terminals_save_the_step(
    number: int, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
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
    figure(record_property, "signals answered with a checkpoint of the step in hand", 1)


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


@pytest.mark.slow
@pytest.mark.timeout(60 * 60)
def test_nano_answers_signals(cache: Path, tmp_path: Path, record_property: Record) -> None:
    """Preset nano, twenty times: stopped at a random moment of its steps, evaluations and saves, and resumed."""
    out, slowest, slow = tmp_path / "run", 0.0, 0
    moments = random.Random(0)
    for i in range(20):
        flags = [
            "--out",
            str(out),
            "--resume",
            f"--steps={STEPS}",
            "--eval-every=7",
            "--save-every=5",
            "--set=train.log_every=1",
        ]
        with (tmp_path / "printed").open("w+") as printed:
            process = runs.start(flags, cache, output=printed)
            wait_for_step(process, out, logged(out) + 2)
            time.sleep(moments.uniform(0, 4))
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM if i % 2 else signal.SIGINT)
            status = process.wait()
        seconds = time.monotonic() - begin
        slowest, slow = max(slowest, seconds), slow + (seconds > 10)
        assert status == (143 if i % 2 else 130), (tmp_path / "printed").read_text()[-1000:]
        assert newest(out) == logged(out)
    figure(record_property, "signals answered with a checkpoint of the step in hand", 20)
    figure(record_property, "signals answered after more than 10 s", slow)
    figure(record_property, "s until nano had saved and left, at most", round(slowest, 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_stopped_run_ends_like_one_that_was_not(
    seed: int, text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, record_property: Record
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
    figure(record_property, "interrupted runs that differ from the uninterrupted one", int(found != whole[1]))
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


def test_an_echo_is_not_a_second_signal(text: Path, cache: Path, tmp_path: Path) -> None:
    """A terminal and `uv run` both pass on one Ctrl-C."""
    out = tmp_path / "run"
    process = runs.start(runs.flags(text, out, steps=STEPS, eval_every=STEPS, save_every=STEPS), cache)
    wait_for_step(process, out, 3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert newest(out) == logged(out)


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
