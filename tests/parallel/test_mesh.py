"""Which device has which place of a mesh."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.config import MeshShape
from moe_jax.parallel.mesh import arranged


def chips(*grid: int) -> list[Any]:
    """TPU chips in the order in which JAX numbers those of v5e: hosts of 2 x 2 chips, one after the other."""
    found = [SimpleNamespace(platform="tpu", coords=(*place, 0)) for place in np.ndindex(*grid)]
    return sorted(found, key=lambda chip: (chip.coords[0] // 2, chip.coords[1] // 2, chip.coords))


def box(group: np.ndarray) -> tuple[int, ...]:
    """The sides of the smallest box around the chips of a group, the longest first."""
    places = np.array([chip.coords for chip in group.flat])
    return tuple(sorted(np.ptp(places, axis=0)[:2] + 1, reverse=True))


@pytest.mark.parametrize(
    ("grid", "mesh", "block"),
    [
        ((16, 16), "data=16,expert=16", (4, 4)),
        ((8, 16), "data=8,expert=16", (4, 4)),
        ((4, 8), "data=2,expert=16", (4, 4)),
        ((4, 4), "data=2,expert=8", (4, 2)),
        ((16, 16), "data=8,fsdp=4,expert=8", (4, 2)),
        ((2, 4), "data=8", (1, 1)),
        ((2, 4), "expert=8", (4, 2)),
        ((3, 4), "data=4,expert=3", (3, 1)),
    ],
)
def test_the_chips_of_one_group_of_experts_are_a_block(grid: tuple[int, ...], mesh: str, block: tuple) -> None:
    shape = MeshShape.parse(mesh)
    placed = arranged(chips(*grid), shape)
    assert placed.shape == shape
    assert len({chip.coords for chip in placed.flat}) == shape.devices, "each chip once"
    groups = placed.reshape(-1, shape.expert)
    assert {box(group) for group in groups} == {block}


def test_next_come_the_chips_of_fsdp() -> None:
    placed = arranged(chips(16, 16), MeshShape.parse("data=4,fsdp=4,expert=16"))
    assert {box(group) for group in placed} == {(8, 8)}, "2 x 2 blocks of 4 x 4"


def test_slices_of_three_dimensions() -> None:
    found = [SimpleNamespace(platform="tpu", coords=place) for place in np.ndindex(4, 4, 4)]
    groups = arranged(found, MeshShape.parse("data=8,expert=8")).reshape(-1, 8)
    for group in groups:
        places = np.array([chip.coords for chip in group])
        assert tuple(np.ptp(places, axis=0)) == (1, 1, 1)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_other_devices_keep_their_order(platform: str) -> None:
    devices = [SimpleNamespace(platform=platform, id=i) for i in range(8)]
    placed = arranged(devices, MeshShape.parse("data=2,expert=4"))
    assert [[device.id for device in row] for row in placed.reshape(2, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_chips_that_fill_no_box_keep_their_order() -> None:
    """Such as two cores of one chip, or a slice with a hole."""
    pairs = [SimpleNamespace(platform="tpu", coords=(i // 2, 0, 0), id=i) for i in range(8)]
    assert [device.id for device in arranged(pairs, MeshShape.parse("data=8")).flat] == list(range(8))
    hole = [SimpleNamespace(platform="tpu", coords=(x, y, 0), id=4 * x + y) for x, y in np.ndindex(2, 4)][:-1]
    assert [device.id for device in arranged(hole, MeshShape.parse("data=7")).flat] == list(range(7))
