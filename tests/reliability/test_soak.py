"""Half an hour of training, evaluations and saves included: memory does not grow."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.reliability import runs

MINUTES, WARM_MINUTES = 30, 5
"""Processor time of the run, and of its beginning: by then everything is compiled, evaluated and saved many times."""
GROWTH = 1.01
"""The largest memory of the last third / that of the first."""


def processor_minutes(pid: int) -> float:
    """Processor time of a process, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") / 60


def resident_kb(pid: int) -> int:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1])


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_half_an_hour_of_nano(cache: Path, tmp_path: Path) -> None:
    out, sizes = tmp_path / "run", []
    with (tmp_path / "printed").open("w+") as printed:
        flags = ["--out", str(out), "--steps=100000", "--eval-every=100", "--save-every=50"]
        process = runs.start(flags, cache, output=printed)
        try:
            while (used := processor_minutes(process.pid)) < MINUTES:
                assert process.poll() is None, (tmp_path / "printed").read_text()[-1000:]
                if used > WARM_MINUTES:
                    sizes.append(resident_kb(process.pid))
                time.sleep(1)
        finally:
            process.kill()
            process.wait()
    steps = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert steps > 100
    # Within a step the memory goes between levels 60 MB apart. The highest that is not rare is the same in all parts.
    third = len(sizes) // 3
    first, last = (sorted(part)[len(part) * 9 // 10] for part in (sizes[:third], sizes[-third:]))
    assert last < GROWTH * first
