"""How a run is computed: precision, memory, the mesh of devices, and the processes. Standard library only."""

import os
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.config.section import Section, format_bound, setting
from moe_jax.config.train import TrainConfig
from moe_jax.system.errors import ConfigError

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
Fit = Literal["auto", "any", "off"]

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT]i?)B", re.IGNORECASE)

MESH_FORM = "axes data, fsdp and expert, each at most once with a size of 1 to 65,536, such as data=2,expert=4"


@dataclass(frozen=True)
class ExecutionConfig(Section):
    """How the model is computed. A resumed run may change all of it."""

    section_name: ClassVar[str] = "execution"

    compute_dtype: ComputeDtype = setting("auto", "--precision")
    """Precision of activations and matrix products. `auto` chooses from the device and says why."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
    deterministic: bool = setting(False, "--deterministic")
    """On a GPU, use only programs that give the same bits each time, at some cost in speed. A CPU always does."""
    mesh: str = setting("", "--mesh")
    """Devices that train together, as AXIS=SIZE,...: `data` divides the batch, `fsdp` also the matrices, `expert` also
    the experts. The sizes multiply to the number of devices. Without it, one device."""
    fit: Fit = setting("auto", "--fit")
    """What may change so that the run fits the memory of its device: `auto` remat and the size of the micro-batch, with
    as many sequences a step; `any` also the optimizer, to a leaner one, which trains differently; `off` nothing."""
    memory: str = setting("", "--memory")
    """Memory that the run may take, such as 700MB or 3.5GiB. Without it, what a GPU has free; a CPU has no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        devices = MeshShape.parse(self.mesh).devices
        self.check(not self.memory or self.memory_bytes > 0, "memory", "a size such as 700MB or 3.5GiB")
        self.check(not self.memory or devices == 1, "memory", "left out with --mesh; it is for one device")

    @property
    def fitted(self) -> bool:
        """Whether the run may be changed to fit its device. A mesh of several devices is taken as it is."""
        return self.fit != "off" and MeshShape.parse(self.mesh).devices == 1

    @property
    def memory_bytes(self) -> float:
        """Bytes of `memory`; 0 unless it is a size."""
        size = _SIZE.fullmatch(self.memory)
        if size is None:
            return 0.0
        unit = size[2].upper()
        return float(size[1]) * (1024 if unit.endswith("I") else 1000) ** ("KMGT".index(unit[0]) + 1)

    def check_mesh(self, model: ModelConfig, train: TrainConfig) -> None:
        """Raise ConfigError unless the model and the batch can be divided over the mesh."""
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

        Raises ConfigError if the text is not of this form.
        """
        sizes: dict[str, int] = {}
        for part in text.split(",") if text else ():
            axis, _, size = part.partition("=")
            known = axis in cls._fields and axis not in sizes
            if not (known and size.isascii() and size.isdigit() and len(size) <= 5 and 1 <= int(size) <= 2**16):
                raise ConfigError(f"--mesh {text}: must be {MESH_FORM}")
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = [f"{axis} {size}" for axis, size in zip(self._fields, self, strict=True) if size > 1]
        return " x ".join(sizes) or "one device"


@dataclass(frozen=True)
class ProcessGroup(Section):
    """The place of this process in a group of processes that train one run together."""

    section_name: ClassVar[str] = ""

    num_processes: int = setting(1, within=(1, 2**16))
    """Processes that train together, each started by the same command with its own --process-id. Needs --mesh."""
    process_id: int = 0
    """The number of this process, from 0. Process 0 writes the files of the run."""
    coordinator_address: str = ""
    """HOST:PORT at which process 0 listens and the others call it. `cluster` lets JAX find this and the two above:
    under SLURM, Kubernetes or Open MPI, or on a TPU pod."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detected:
            ok = self.num_processes == 1 and self.process_id == 0
            self.check(ok, "coordinator_address", "given alone, since the cluster says the number of processes")
            return
        ok = 0 <= self.process_id < self.num_processes
        self.check(ok, "process_id", f"between 0 and {format_bound(self.num_processes - 1)}")
        host, _, port = self.address.rpartition(":")
        ok = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
        self.check(ok or not self.several, "coordinator_address", "HOST:PORT of process 0, such as 127.0.0.1:9876")

    @property
    def address(self) -> str:
        """HOST:PORT of process 0; from JAX_COORDINATOR_ADDRESS, which JAX reads too, if none is given."""
        return self.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")

    @property
    def local(self) -> bool:
        """Whether all processes run on this machine."""
        return self.address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")

    @property
    def detected(self) -> bool:
        """Whether JAX asks the cluster."""
        return self.coordinator_address == "cluster"

    @property
    def several(self) -> bool:
        """Whether this process trains together with others."""
        return self.detected or self.num_processes > 1
