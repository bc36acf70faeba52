"""Half an hour of preset nano, evaluations and saves included: memory does not grow."""

import os
import time
from pathlib import Path

import pytest

from tests.reliability import runs
from tests.reliability.figures import Record, figure
from tests.reliability.test_signals import logged

MINUTES = 30
"""Of the clock, and of the process's own time: on a busy or paused machine the soak takes longer, not less."""
WARM_MINUTES = 5
"""Of its own time. By then everything is compiled, and evaluated and saved many times."""
TICK = os.sysconf("SC_CLK_TCK")


def own_minutes(pid: int) -> float:
    """Processor time of a process, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK / 60


def resident(pid: int) -> int:
    """kB."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1])


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.timeout(60 * 60 * 12)
def test_half_an_hour_of_nano(cache: Path, tmp_path: Path, record_property: Record) -> None:
    out = tmp_path / "run"
    printed = (tmp_path / "printed").open("w+")
    flags = ["--out", str(out), "--steps=100000", "--eval-every=100", "--save-every=50"]
    process = runs.start(flags, cache, output=printed, tuned=True)
    sizes: list[int] = []
    begin = time.monotonic()
    try:
        while (own := own_minutes(process.pid)) < MINUTES or time.monotonic() - begin < 60 * MINUTES:
            assert process.poll() is None, (tmp_path / "printed").read_text()[-1000:]
            if own > WARM_MINUTES:
                sizes.append(resident(process.pid))
            time.sleep(1)
        steps = logged(out)
    finally:
        process.kill()
        process.wait()
        printed.close()
    # Within a step the memory goes between levels 60 MB apart, and how long it stays at each changes with what else the
    # machine does: medians jumped from one to the next. The highest that is not rare is the same level in all parts.
    third = len(sizes) // 3
    first, last = (sorted(part)[len(part) * 9 // 10] for part in (sizes[:third], sizes[-third:]))
    figure(record_property, "minutes of processor time in the soak", round(own))
    figure(record_property, "steps trained in the soak", steps)
    figure(record_property, "MB resident early in the soak (90th percentile)", first // 1000)
    figure(record_property, "MB resident late in the soak (90th percentile)", last // 1000)
    assert steps > 100
    assert last < 1.01 * first
