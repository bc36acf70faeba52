"""The training step of a preset, compiled for many devices that need not be there.

XLA compiles one program, which every device runs. So all sizes are those of one device. What an earlier process
compiled is looked up by its lowered program, the devices and the versions of the compilers.
"""

import base64
import contextlib
import dataclasses
import gzip
import importlib.metadata
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import SingleDeviceSharding

from moe_jax.config import MeshShape, RunConfig, UserError
from moe_jax.parallel.layout import mesh_of
from moe_jax.planning.device_memory import (
    CODE_NOT_RUN,
    HOW,
    MISSING_PTXAS,
    for_described_gpu,
    gpu_devices,
)
from moe_jax.planning.target import Target
from moe_jax.system.files import cached_json
from moe_jax.training.programs import Programs
from predicted.interconnect import GPU_LINKS, Hosts, Place, Torus
from predicted.roofline import Rates
from predicted.tpu import Slice
from predicted.tpu_programs import with_trip_counts

OPTIONS: dict[str, dict[str, Any]] = {"gpu": CODE_NOT_RUN, "tpu": {}}
_TOO_LARGE = re.compile(r"\(([0-9.]+)([KMGT])\) exceeds available HBM")
"""What libtpu says of a program that takes more memory than a chip has, with its memory."""


@dataclass(frozen=True)
class Devices:
    """Equal devices that a plan is made for."""

    chip: Target | Slice
    count: int
    rates: Rates
    links: Hosts | Torus
    memory: float
    """Bytes of a device."""
    usable: float
    """Bytes of a device that a program may use."""

    @classmethod
    def gpus(cls, target: Target, count: int) -> "Devices":
        """The caller has checked them (`interconnect.check_gpus`)."""
        links = GPU_LINKS[target.name]
        return cls(target, count, Rates.of(target), links, target.memory, target.budget * 2**20)

    @classmethod
    def tpus(cls, slice_: Slice) -> "Devices":
        return cls(slice_, slice_.chips, slice_.rates, slice_.links, slice_.memory, slice_.usable)

    @property
    def name(self) -> str:
        return self.chip.name if isinstance(self.chip, Slice) else f"{self.count} x {self.chip.name}"

    def described(self) -> list[Any]:
        """One description for each device, for XLA's compiler. Raises UserError if the compiler is not installed."""
        if isinstance(self.chip, Slice):
            return self.chip.devices()
        assert isinstance(self.links, Hosts)
        hosts = -(-self.count // self.links.per_host)
        return gpu_devices(self.chip, f"1x{hosts}x{self.count // hosts}")

    def places(self, mesh: str) -> list[Place]:
        """Where the devices of a mesh are, in its order.

        Raises UserError for TPUs if their compiler is not installed.
        """
        if isinstance(self.links, Hosts):
            return [self.links.place(index) for index in range(self.count)]
        grid = create_device_mesh(MeshShape.parse(mesh), self.described())
        return [tuple(chip.coords[:2]) for chip in grid.flat]


@dataclass(frozen=True)
class Compiled:
    """What a plan needs of a compiled step. Bytes of one device."""

    arguments: int
    outputs: int
    """Outputs that do not take the memory of a donated argument."""
    temporary: int
    text: str
    """The optimised HLO. "" if the compiler refused the program, because it takes more memory than the device has. Then
    its outputs count as temporary."""
    seconds: float
    """Processor time of the compilation."""

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporary


def programs_for(config: RunConfig, devices: Devices, described: list[Any]) -> Programs:
    """The programs of a configuration on its mesh of described devices, or on the one device.

    Raises ConfigError if the mesh has another number of places than there are devices.
    """
    return Programs.of(config, devices.chip, mesh=mesh_of(config.execution.mesh, described))


def compile_step(programs: Programs, devices: Devices, described: list[Any]) -> Compiled:
    """Compile the training step for the devices, or look it up."""
    state, batch = programs.state_shapes, programs.batch_shapes(programs.config.train.batch_size)
    if programs.layout is None:
        place = SingleDeviceSharding(described[0])
        state, batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (state, batch))
    platform = devices.chip.platform
    with for_described_gpu() if platform == "gpu" and programs.layout is None else contextlib.nullcontext():
        lowered = programs.step.lower(state, batch)  # pyright: ignore[reportFunctionMemberAccess]
    compiler = "libtpu" if platform == "tpu" else "jaxlib"
    what = devices.name if isinstance(devices.chip, Slice) else f"{devices.count} {devices.chip.text}"
    versions = [importlib.metadata.version(name) for name in ("jaxlib", compiler)]
    order = [] if programs.layout is None else [device.id for device in programs.layout.mesh.devices.flat]
    parts = [lowered.as_text(), what, repr(order), repr(OPTIONS[platform]), *versions]
    arguments = sum(map(_bytes_on_device, jax.tree.leaves((state, batch))))
    return _from_json(cached_json("plans", parts, lambda: _to_json(_compile(lowered, platform, arguments))))


def _to_json(found: Compiled) -> dict[str, Any]:
    """With the text compressed: it has some megabytes."""
    return dataclasses.asdict(found) | {"text": base64.b64encode(gzip.compress(found.text.encode())).decode()}


def _from_json(kept: dict[str, Any]) -> Compiled:
    text: Any = gzip.decompress(base64.b64decode(kept["text"])).decode()
    return Compiled(**kept | {"text": text})


def _bytes_on_device(leaf: Any) -> int:
    """Bytes of an argument on one device. The batch of a mesh, which has no layout yet, is too small to matter."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


_WRITTEN_FOR = {"gpu": "operation_queue_id", "tpu": ":T("}
"""What only programs for this platform have. Without a place for its arguments XLA would compile for the CPU."""


def _compile(lowered: Any, platform: str, arguments: int) -> Compiled:
    start = time.process_time()
    try:
        compiled = lowered.compile(compiler_options=OPTIONS[platform])
    except jax.errors.JaxRuntimeError as error:
        if any(cause in str(error) for cause in MISSING_PTXAS):
            raise UserError(f"planning needs ptxas: {HOW}") from error
        if too_large := _TOO_LARGE.search(str(error)):
            used = float(too_large[1]) * 1024 ** ("KMGT".index(too_large[2]) + 1)
            return Compiled(arguments, 0, round(used) - arguments, "", time.process_time() - start)
        raise
    text = compiled.as_text()
    if _WRITTEN_FOR[platform] not in text:
        raise AssertionError(f"compiled for another device, not for a {platform}")
    m = compiled.memory_analysis()
    return Compiled(
        m.argument_size_in_bytes,
        m.output_size_in_bytes - m.alias_size_in_bytes,
        m.temp_size_in_bytes,
        with_trip_counts(text),
        time.process_time() - start,
    )
