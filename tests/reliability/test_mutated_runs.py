"""Random damage to the folder of a run: every command refuses it in one line, says what is wrong, or is right.

`MOE_JAX_MUTATION=seed/number` repeats one mutation.
"""

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.reliability import runs
from tests.reliability.figures import Record, figure
from tests.reliability.mutated_run import Battery, Worker

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(not hasattr(os, "mkfifo") or shutil.which("cp") is None, reason="damages with links and pipes"),
]
SEED = 0
FEW, MANY = 40, 2000


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Battery]:
    folder = tmp_path_factory.mktemp("mutations")
    runs.write_text(folder / "stories.txt")
    (folder / "cache").mkdir()
    worker = Worker(folder / "cache")
    yield Battery(folder, worker, folder / "stories.txt")
    worker.close()


def mutate(battery: Battery, numbers: range, record: Record, seed: int = SEED) -> None:
    wrong = [fault for number in numbers for fault in battery.check(seed, number)]
    counts = battery.counts
    figure(record, "mutations of a run's folder", len(numbers))
    figure(record, "commands on mutated runs", counts.commands)
    figure(record, "faults of these commands", len(wrong))
    print(counts)
    assert not wrong, "\n".join(wrong)


def test_mutations(battery: Battery, record_property: Record) -> None:
    one = os.environ.get("MOE_JAX_MUTATION")
    seed, number = map(int, one.split("/")) if one else (SEED, 0)
    mutate(battery, range(number, number + 1) if one else range(FEW), record_property, seed)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_many_mutations(battery: Battery, record_property: Record) -> None:
    mutate(battery, range(MANY), record_property, SEED + 1)
