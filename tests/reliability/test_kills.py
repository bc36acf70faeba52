"""kill -9 at random moments of real runs: whatever is cut off, the run ends as one that was never stopped, bit for bit.

The moments are drawn from the whole life of a process, its start included. The long form keeps what it has done in
pytest's cache, so that it can itself be stopped and started again (`--cache-clear` begins anew).
"""

import hashlib
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs
from tests.reliability.figures import Record, figure

pytestmark = pytest.mark.reliability
KILLS_A_RUN = 4


def source_digest() -> str:
    """Of the program: results for another one count for nothing."""
    digest = hashlib.sha256()
    for path in sorted((runs.ROOT / "moe_jax").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def killed_run(
    seed: int, text: Path, cache: Path, out: Path, seconds: float
) -> tuple[int, subprocess.CompletedProcess[str]]:
    """Start the run, kill it and go on, KILLS_A_RUN times, then let it finish. The kills that hit, and the last run.

    What is left of a run takes less time than a whole one: where the process was gone before its moment came, the
    next moments are drawn from half the time.
    """
    random_moment = random.Random(seed)
    hit = 0
    while hit < KILLS_A_RUN:
        process = runs.start([*runs.flags(text, out), "--resume"], cache)
        time.sleep(random_moment.uniform(0, seconds))
        alive = process.poll() is None
        hit, seconds = hit + alive, seconds if alive else seconds / 2
        process.kill()
        process.communicate()
    return hit, runs.complete([*runs.flags(text, out), "--resume"], cache)


@pytest.fixture(scope="module")
def seconds(
    text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> float:
    """How long an uninterrupted process takes here, now that everything is compiled."""
    begin = time.monotonic()
    out = tmp_path_factory.mktemp("runs") / "timed"
    assert runs.complete(runs.flags(text, out), cache).returncode == 0
    assert runs.result(out) == whole[1], "two uninterrupted runs differ"
    return time.monotonic() - begin


def check(
    seed: int,
    text: Path,
    cache: Path,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    seconds: float,
    record: Record,
) -> None:
    out = tmp_path / "run"
    hit, last = killed_run(seed, text, cache, out, seconds)
    figure(record, "kill -9 that hit a live process", hit)
    figure(record, "runs lost", int(last.returncode != 0))
    assert last.returncode == 0, last.stderr
    equal = runs.result(out) == whole[1]
    figure(record, "interrupted runs that differ from the uninterrupted one", int(not equal))
    assert equal
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("seed", range(3))
def test_twelve_kills(
    seed: int,
    text: Path,
    cache: Path,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    seconds: float,
    record_property: Record,
) -> None:
    check(seed, text, cache, whole, tmp_path, seconds, record_property)


@pytest.mark.slow
@pytest.mark.timeout(60 * 60 * 2)  # a machine that pauses the battery is none of its faults
@pytest.mark.parametrize("seed", range(100, 125))
def test_a_hundred_kills(
    seed: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Record,
) -> None:
    key = f"moe-jax/kills/{source_digest()}/{seed}"
    if request.config.cache.get(key, False):
        figure(record_property, "kill -9 that hit a live process, in an earlier session", KILLS_A_RUN)
        return
    values = [request.getfixturevalue(name) for name in ("text", "cache", "whole")]
    check(seed, *values, tmp_path, request.getfixturevalue("seconds"), record_property)
    request.config.cache.set(key, True)
