"""Random damage to the folder of a run: every command refuses it in one line, says what is wrong, or is right.

`MOE_JAX_MUTATION=seed/number` repeats one mutation. `seed/first-last` runs a part of the long form.
"""

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.reliability import runs
from tests.reliability.figures import Record, figure
from tests.reliability.mutated_run import Battery, Worker
from tests.reliability.parts import cases

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


def mutate(battery: Battery, seed: int, numbers: range, record: Record) -> None:
    wrong = [fault for number in numbers for fault in battery.check(seed, number)]
    counts = battery.counts
    figure(record, "mutations of a run's folder", len(numbers))
    figure(record, "commands on mutated runs", counts.commands)
    figure(record, "faults of these commands", len(wrong))
    print(counts)
    assert not wrong, "\n".join(wrong)


def test_mutations(battery: Battery, record_property: Record) -> None:
    mutate(battery, *cases("MOE_JAX_MUTATION", SEED, FEW), record_property)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_many_mutations(battery: Battery, record_property: Record) -> None:
    mutate(battery, *cases("MOE_JAX_MUTATION", SEED + 1, MANY), record_property)
