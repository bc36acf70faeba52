"""The mesh of a run: devices in a grid with the axes data, fsdp and expert."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from moe_jax.config import ConfigError, MeshShape

AXES = MeshShape._fields
"""Names of the axes, from the slowest to the fastest. Sequence i of a batch lies on device i // (B / devices)."""


def mesh_of(text: str, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that `--mesh` names, on all devices of all processes unless `devices` are given.

    None for a mesh of one device: the run then uses the programs for one device. Raises ConfigError unless the mesh has
    as many places as there are devices.
    """
    shape = MeshShape.parse(text)
    if shape.devices == 1:
        return None
    there = jax.devices() if devices is None else list(devices)
    if shape.devices != len(there):
        kind = there[0].platform
        raise ConfigError(
            f"--mesh {text}: has {shape.devices} places, and JAX sees {len(there)} device{'s' * (len(there) != 1)} "
            f"({kind}); give a mesh whose product is {len(there)}, or data=1 for one device"
        )
    # jax.make_mesh makes Explicit axes unless told otherwise, and the model's gathers would then need annotations.
    return Mesh(arranged(there, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(devices: Sequence[Any], shape: MeshShape) -> np.ndarray:
    """The devices in the places of a mesh: an array of devices of this shape.

    A chip of a TPU slice has links to its neighbours only. In an all-to-all, half of the chips of a group send to the
    other half, so the links across the group's middle limit it. Most links cross the middle of a square. So the chips
    that differ only in `expert` form a block that is as square as possible, then those of `fsdp`, then those of `data`.

    Other devices keep the order that JAX gives them: those of one host follow one another.
    """
    grid = _grid(devices)
    if grid is None:
        return np.array(devices).reshape(shape)
    parts = min(_divisions(shape, grid.shape), key=lambda parts: [max(sides) for sides in reversed(parts)])
    # A side of the grid is data x fsdp x expert, in this order. Then the sides of each axis are put together.
    sides = [side for along in zip(*parts, strict=True) for side in along]
    order = [len(parts) * i + axis for axis in range(len(parts)) for i in range(grid.ndim)]
    return grid.reshape(sides).transpose(order).reshape(shape)


def _grid(devices: Sequence[Any]) -> np.ndarray | None:
    """TPU chips as an array by their coordinates. None for other devices, and if they do not fill a box."""
    if any(device.platform != "tpu" for device in devices):
        return None
    places = np.array([device.coords for device in devices])
    places -= places.min(axis=0)
    grid = np.full(places.max(axis=0) + 1, None, dtype=object)
    for place, device in zip(places, devices, strict=True):
        grid[tuple(place)] = device
    filled = grid.size == len(devices) and all(device is not None for device in grid.flat)
    return grid if filled else None


def _divisions(shape: MeshShape, grid: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to cut each side of the grid into data x fsdp x expert. For each axis of the mesh: its part of each
    side."""
    cuts = [[cut for cut in itertools.product(range(1, side + 1), repeat=3) if math.prod(cut) == side] for side in grid]
    for chosen in itertools.product(*cuts):
        parts = tuple(zip(*chosen, strict=True))
        if all(math.prod(part) == size for part, size in zip(parts, shape, strict=True)):
            yield parts
