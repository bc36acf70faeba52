"""Random command lines of train.py, run in full: refused in one line, or trained, and resumed to equal bits.

`MOE_JAX_LINE=seed/number` repeats one line. `seed/first-last` runs a part of the long form.
"""

from collections.abc import Iterator

import pytest

from tests.reliability.figures import Record, figure
from tests.reliability.line_runs import Battery, run_in_pool
from tests.reliability.parts import cases

pytestmark = pytest.mark.reliability
SEED = 0
FEW, MANY = 12, 1000


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Battery]:
    with Battery.made(tmp_path_factory.mktemp("lines")) as battery:
        yield battery


def check(battery: Battery, seed: int, numbers: range, record: Record) -> None:
    before = battery.counts.copy()
    wrong = run_in_pool(battery, seed, numbers)
    counts = battery.counts - before
    figure(record, "random command lines", len(numbers))
    figure(record, "random command lines that trained and were resumed with equal bits", counts["resumed"])
    figure(record, "random command lines that were refused in one line", counts["refused"])
    figure(record, "faults of random command lines", len(wrong))
    print(dict(counts))
    assert not wrong, "\n".join(wrong)
    if len(numbers) >= FEW:  # fewer lines may all be refused
        assert counts["resumed"] > 0, dict(counts)


def test_random_lines(battery: Battery, record_property: Record) -> None:
    check(battery, *cases("MOE_JAX_LINE", SEED, FEW), record_property)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_many_random_lines(battery: Battery, record_property: Record) -> None:
    check(battery, *cases("MOE_JAX_LINE", SEED + 1, MANY), record_property)
