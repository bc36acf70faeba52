"""Half an hour of preset nano, evaluations and saves included: memory does not grow."""

import time
from pathlib import Path

import pytest

from tests.reliability import runs
from tests.reliability.figures import Record, figure

MINUTES = 30
WARM_MINUTES = 5
"""By then everything is compiled, and evaluated and saved once."""


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.timeout(60 * (MINUTES + 15))
def test_half_an_hour_of_nano(cache: Path, tmp_path: Path, record_property: Record) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads the memory of a process from /proc")
    flags = ["--out", str(tmp_path / "run"), "--steps=100000", "--eval-every=100", "--save-every=50"]
    process = runs.start(flags, cache)
    sizes: list[int] = []
    try:
        while not (tmp_path / "run" / "checkpoints").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(1)
        for minute in range(MINUTES):
            time.sleep(60)
            if minute >= WARM_MINUTES:
                line = next(x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmRSS" in x)
                sizes.append(int(line.split()[1]))
    finally:
        process.kill()
        process.communicate()
    third = len(sizes) // 3
    first, last = (sorted(part)[len(part) // 2] for part in (sizes[:third], sizes[-third:]))
    figure(record_property, "MB resident early in the soak (median)", first // 1000)
    figure(record_property, "MB resident late in the soak (median)", last // 1000)
    assert last < 1.01 * first
