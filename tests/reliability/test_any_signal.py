"""Every signal that asks to stop, at random moments of a whole process: from its start to its end, in steps, while it
evaluates, while it saves. The status is right, the run ends with the bits of one that was never stopped, and no draft
is left.

`MOE_JAX_SIGNAL=seed` repeats one run with its signals. The long form keeps the seeds that it has done in pytest's
cache, as the kills do.
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs
from tests.reliability.figures import Record, figure
from tests.reliability.test_kills import source_digest

pytestmark = pytest.mark.reliability
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM")
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
FEW, MANY = 1, 50
"""Runs; each gets every signal once."""
OFTEN = {"steps": 20, "eval_every": 3, "save_every": 2}
"""Evaluations and saves take most of the time after the start."""
ASKED = os.environ.get("MOE_JAX_SIGNAL")


@pytest.fixture(scope="module")
def uninterrupted(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What the run comes to, and the seconds of a process whose programs are compiled."""
    folder = tmp_path_factory.mktemp("signals")
    results = []
    for name in ("compiles", "timed"):
        begin = time.monotonic()
        finished = runs.complete(runs.flags(text, folder / name, **OFTEN), cache)
        assert finished.returncode == 0, finished.stderr
        results.append(runs.result(folder / name))
    assert results[0] == results[1], "two uninterrupted runs differ"
    return results[0], time.monotonic() - begin


def drafts(run: Path) -> list[str]:
    """Unfinished files and folders of saves."""
    names = [path.relative_to(run).as_posix() for path in run.rglob("*")]
    return [name for name in names if re.search(r"\.draft$|/tmp_|\.replaced$|\.partial$", name)]


def left_well(number: int, status: int, err: str) -> bool:
    """Whether a process has ended as it should: after its work; by the program's own answer; or before the program had
    begun to listen, by the system's."""
    if status in (0, -number):
        return "Traceback" not in err
    return status == 128 + number and "Traceback" not in err


def send(number: int, moment: float, flags: list[str], cache: Path) -> tuple[int | None, int, str]:
    """Go on with the run, and send a signal at a moment of the process. When it was sent (ns; None if the process had
    ended before), the process's status, and its stderr."""
    process = runs.start([*flags, "--resume"], cache)
    time.sleep(moment)
    sent = time.time_ns() if process.poll() is None else None
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    return sent, process.returncode, err


def last_change(run: Path) -> int:
    """When the newest file of a run was written, in ns."""
    return max(path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file())


def check(seed: int, fixtures: tuple[Path, Path, tuple[dict[str, Any], float]], out: Path, record: Record) -> None:
    """Send each signal once, each to a process of its own that goes on with the run, and let the run finish. Where a
    run is finished before, a new one begins."""
    text, cache, (expected, seconds) = fixtures
    flags, moments = runs.flags(text, out, **OFTEN), random.Random(seed)
    told: list[tuple[str, float, int]] = []
    for number in moments.sample(NUMBERS, len(NUMBERS)):
        share, sent = 1.0, None
        while sent is None:  # a process that had ended before its moment came takes less time than this
            moment = moments.uniform(0, share * seconds)
            sent, status, err = send(number, moment, flags, cache)
            told.append((signal.Signals(number).name, round(moment, 2), status))
            assert left_well(number, status, err), f"seed {seed}: {told}: {err[-1500:]}"
            share *= 0.7
            if status == 0:
                lost = sent is not None and last_change(out) > sent
                assert not lost, f"seed {seed}: {told}: the run went on after the signal"
                same_as_uninterrupted(out, expected, f"seed {seed}: {told}", record)
        figure(record, "signals that hit a live process", 1)
        figure(record, "of these, answered by the program itself", int(status == 128 + number))
        figure(record, "of these, in the last moments of a finished run", int(status == 0))
    finished = runs.complete([*flags, "--resume"], cache)
    assert finished.returncode == 0, f"seed {seed}: {told}: {finished.stderr}"
    same_as_uninterrupted(out, expected, f"seed {seed}: {told}", record)


def same_as_uninterrupted(out: Path, expected: dict[str, Any], told: str, record: Record) -> None:
    """Compare a finished run with the uninterrupted one, and remove it."""
    equal = runs.result(out) == expected
    figure(record, "runs that were signalled and finished", 1)
    figure(record, "interrupted runs that differ from the uninterrupted one", int(not equal))
    assert equal, told
    assert drafts(out) == [], told
    shutil.rmtree(out)


@pytest.mark.parametrize("seed", [int(ASKED)] if ASKED else range(FEW))
def test_every_signal(
    seed: int,
    text: Path,
    cache: Path,
    uninterrupted: tuple[dict[str, Any], float],
    tmp_path: Path,
    record_property: Record,
) -> None:
    check(seed, (text, cache, uninterrupted), tmp_path / "run", record_property)


@pytest.mark.slow
@pytest.mark.timeout(60 * 60)
@pytest.mark.parametrize("seed", range(100, 100 + MANY))
def test_every_signal_at_fifty_moments(
    seed: int, request: pytest.FixtureRequest, tmp_path: Path, record_property: Record
) -> None:
    key = f"moe-jax/signals/{source_digest()}/{seed}"
    if request.config.cache.get(key, False):
        figure(record_property, "signals that hit a live process, in an earlier session", len(NUMBERS))
        return
    values = tuple(request.getfixturevalue(name) for name in ("text", "cache", "uninterrupted"))
    check(seed, values, tmp_path / "run", record_property)
    request.config.cache.set(key, True)
