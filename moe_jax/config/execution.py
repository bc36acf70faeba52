"""How a model is computed: precision, memory, determinism, devices and processes. A resumed run may change every field.

Standard library only.
"""

import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.config.section import Section
from moe_jax.config.train import TrainConfig
from moe_jax.system.errors import ConfigError, FieldError

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

MESH_FORM = "axes data, fsdp and expert, each at most once with a size of 1 to 65,536, such as data=2,expert=4"


@dataclass(frozen=True)
class ExecutionConfig(Section, section="execution"):
    """How a model is computed. The function that it computes stays the same, up to rounding."""

    compute_dtype: ComputeDtype = "auto"
    """Precision of activations and matrix products. `auto` chooses from the device and says why."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
    deterministic: bool = False
    """On a GPU, use only programs that give the same bits each time, at some cost in speed. A CPU always does."""
    mesh: str = ""
    """Devices that train together, as AXIS=SIZE,...: `data` divides the batch, `fsdp` also the matrices, `expert` also
    the experts. The sizes multiply to the number of devices. Without it, one device."""

    def __post_init__(self) -> None:
        self.check_choices()
        MeshShape.parse(self.mesh)

    def check_mesh(self, model: ModelConfig, train: TrainConfig) -> None:
        """Raise FieldError unless the model and the batch can be divided over the mesh."""
        shape = MeshShape.parse(self.mesh)
        if train.batch_size % shape.devices:
            problem = f"{shape.devices} devices; --batch-size {train.batch_size} is not a multiple of {shape.devices}"
            raise self.wrong("mesh", problem)
        divides = model.width % shape.fsdp == 0
        self.check(divides, "mesh", f"an fsdp axis that divides --model.width {model.width} evenly")
        if shape.expert > 1:
            allowed = f"without an expert axis: --model.dense {model.dense} has no experts to divide"
            self.check(model.dense == "none", "mesh", allowed)
            divides = model.experts % shape.expert == 0
            self.check(divides, "mesh", f"an expert axis that divides --experts {model.experts} evenly")


class MeshShape(NamedTuple):
    """How many devices lie along each axis of a mesh. The sequences of a batch are divided over all axes."""

    data: int = 1
    """Devices along this axis hold the same parameters."""
    fsdp: int = 1
    """Devices along this axis each hold a part of every matrix, divided along the model width D."""
    expert: int = 1
    """Devices along this axis each hold some of the experts. Tokens travel to them."""

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.expert

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """The shape that a text such as "data=2,expert=4" names. An empty text is one device.

        Raises FieldError if the text is not of this form.
        """
        sizes: dict[str, int] = {}
        for part in text.split(",") if text else ():
            axis, _, size = part.partition("=")
            known = axis in cls._fields and axis not in sizes
            if not (known and size.isascii() and size.isdigit() and len(size) <= 5 and 1 <= int(size) <= 2**16):
                raise FieldError("execution", "mesh", f"--mesh {text}", f"must be {MESH_FORM}")
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = [f"{axis} {size}" for axis, size in zip(self._fields, self, strict=True) if size > 1]
        return " x ".join(sizes) or "one device"


@dataclass(frozen=True)
class ProcessGroup:
    """The place of this process in a group of processes. Process 0 is the coordinator, which the others call."""

    count: int
    index: int
    coordinator: str
    """host:port of process 0."""
    detected: bool = False
    """Whether jax asks the cluster for the other three (SLURM, Kubernetes, Open MPI, TPU)."""

    @classmethod
    def of(cls, count: int | None, index: int | None, coordinator: str) -> "ProcessGroup | None":
        """The group that the flags name. None for a process that trains alone. Raises ConfigError.

        Without an address, JAX_COORDINATOR_ADDRESS is read, as jax itself does.
        """
        if coordinator == "cluster":
            if count is not None or index is not None:
                raise ConfigError(
                    "--coordinator-address cluster: the cluster says the number of processes and the id; leave out "
                    "--num-processes and --process-id"
                )
            return cls(0, 0, "", detected=True)
        if count is None:
            for flag, present in (("--process-id", index is not None), ("--coordinator-address", bool(coordinator))):
                if present:
                    raise ConfigError(f"{flag}: needs --num-processes, the number of processes that train together")
            return None
        if not 1 <= count <= 2**16:
            raise ConfigError(f"--num-processes {count}: must be between 1 and {2**16:,}")
        if count == 1:
            return None
        if index is None or not 0 <= index < count:
            what = "--process-id: must be given," if index is None else f"--process-id {index}: must be"
            raise ConfigError(f"{what} between 0 and {count - 1} for --num-processes {count}")
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        host, _, port = coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) < 2**16):
            raise ConfigError(
                f"--coordinator-address {coordinator}: must be HOST:PORT of process 0, such as 127.0.0.1:9876"
            )
        return cls(count, index, coordinator)

    @property
    def local(self) -> bool:
        """Whether all processes run on this machine."""
        return self.coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
