"""What a save costs, printed with the other figures. What is asserted is what was written, never a time."""

from pathlib import Path

import jax
import pytest

from moe_jax.benchmarks import saving
from moe_jax.config.presets import preset, with_vocabulary
from tests.reliability.figures import Record, figure

pytestmark = pytest.mark.reliability


def measure(name: str, rounds: int, folder: Path, record: Record) -> None:
    state = saving.make_state(with_vocabulary(preset(name)))
    arrays = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    weights = sum(x.nbytes for x in jax.tree.leaves(state.params)) / 1e9
    found = saving.measure(state, folder, rounds)
    assert found["disk_GB"] == pytest.approx(arrays, rel=1e-9)
    # Beside the arrays: the weights again, and a few hundred kB of names and digests.
    assert arrays + weights < found["save_GB"] < arrays + weights + 1e-3
    for way in ("disk", "orbax", "save"):
        figure(record, f"s per GB written ({name}, {way})", round(found[f"{way}_seconds_per_GB"], 2))
    figure(record, f"% of a save is verification ({name})", round(found["verification_percent"], 1))
    assert list(folder.rglob("step_*")) == []


def test_what_a_save_costs(tmp_path: Path, record_property: Record) -> None:
    measure("story", 3, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.timeout(60 * 60)
def test_what_a_save_of_the_seed_costs(tmp_path: Path, record_property: Record) -> None:
    measure("seed-158m", 5, tmp_path, record_property)
