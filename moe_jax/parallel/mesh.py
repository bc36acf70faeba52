"""The mesh of a run: devices in a grid with the axes data, fsdp and expert."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from moe_jax.config import ConfigError, MeshShape

AXES = MeshShape._fields
"""Names of the axes, from the slowest to the fastest. Sequence i of a batch lies on device i // (B / devices)."""


def mesh_of(text: str, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that `--mesh` names, on all devices of all processes unless `devices` are given.

    JAX chooses the places: on a TPU chips that are near each other belong to one group along an axis, and other devices
    keep their order.

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
    return Mesh(create_device_mesh(shape, there), AXES, axis_types=(AxisType.Auto,) * len(AXES))
