"""kill -9 at random moments of real runs: whatever is interrupted, the run ends as one that was never stopped.

The moments are drawn from the whole life of a process, its start included. Every bit is compared.
"""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs
from tests.support import short_form

pytestmark = pytest.mark.reliability
KILLS_A_RUN = 4


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


@pytest.mark.parametrize("seed", short_form([0, *range(100, 125)], [0]))
@pytest.mark.timeout(60 * 60)
def test_killed_four_times(
    seed: int, text: Path, cache: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, seconds: float
) -> None:
    """What is left of a run takes less time than a whole one: where the process has ended before its moment comes, the
    next moments are drawn from half the time."""
    moments, hit, flags = random.Random(seed), 0, [*runs.flags(text, tmp_path / "run"), "--resume"]
    while hit < KILLS_A_RUN:
        process = runs.start(flags, cache)
        time.sleep(moments.uniform(0, seconds))
        alive = process.poll() is None
        hit, seconds = hit + alive, seconds if alive else seconds / 2
        process.kill()
        process.communicate()
    last = runs.complete(flags, cache)
    assert last.returncode == 0, last.stderr
    assert runs.result(tmp_path / "run") == whole[1]
