"""Device memory of a compiled program on an NVIDIA GPU that need not be there.

XLA compiles for a GPU from a description of it (`targets/*.txtpb`): no card, driver or CUDA library takes part, only
JAX's CUDA plugin and ptxas (extra `gpu-plan`). The result cannot run, but it says how much memory each of its buffers
takes, which is decided at compile time. What that leaves out is said in `Target.budget`.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from moe_jax import environment
from moe_jax.config import UserError

MIB = 2**20
PREALLOCATED = 0.75
"""Share of a card's memory that JAX takes at start (XLA_PYTHON_CLIENT_MEM_FRACTION): all that a program gets."""
MARGIN = 0.85
"""Share of that which a plan may use; the rest is for what XLA's plan leaves out."""
BACK_ENDS: dict[str, dict[str, bool]] = {"triton": {}, "cublas": {"xla_gpu_enable_triton_gemm": False}}
"""What multiplies matrices. A card of compute capability 8.0 or more times both when it compiles, and may mix them; a
plan compiles each alone. Older cards have cuBLAS only."""
_OVER_BUDGET = "Can't reduce memory use below"


@dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler sees it."""

    name: str
    text: str
    """Text form of stream_executor.GpuTargetConfigProto."""

    def _field(self, name: str) -> str:
        """The number or the quoted text of a field."""
        found = re.search(rf'\b{name}: *(?:"([^"]*)"|([0-9.]+))', self.text)
        if found is None:
            raise UserError(f"target {self.name}: its description has no {name}")
        return found[1] or found[2]

    @property
    def memory(self) -> int:
        """Bytes that the card reports."""
        return int(self._field("device_memory_size"))

    @property
    def compute_capability(self) -> str:
        return f"{self._field('major')}.{self._field('minor')}"

    @property
    def device_kind(self) -> str:
        return self._field("device_description_str")

    @property
    def platform(self) -> str:
        """As a jax device has it, so that `choose_policy` takes a target too."""
        return "gpu"

    @property
    def budget(self) -> float:
        """MiB that a plan may use: 85 % of the 75 % of the card that JAX takes at start.

        The 15 % are for what lies outside XLA's buffers and is not measured here: loaded kernels, handles and
        workspaces of libraries, scratch memory of autotuning, fragmentation. (The CUDA context and a display live
        in the 25 % that JAX leaves.)
        """
        return MARGIN * PREALLOCATED * self.memory / MIB


def load_target(name: str) -> Target:
    """A target that comes with the package, by its name, or one from a file of the same form."""
    ours = environment.GPU_TARGETS / f"{name}.txtpb"
    path = ours if ours.is_file() else Path(name)
    return Target(path.stem, path.read_text(encoding="utf-8"))


def describe(device: Any) -> Target:
    """The target that a card which is there is, read from its driver."""
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage], no public way to it

    name = str(device.device_kind)
    return Target(name, str(_jax.get_topology_for_devices([device]).target_config))


@dataclass(frozen=True)
class Memory:
    """What one compiled program takes, in MiB."""

    arguments: float
    outputs: float
    """Outputs that do not take over an argument's memory."""
    temporary: float
    warned: bool
    """XLA could not bring the program below its own limit, and said so."""

    @property
    def total(self) -> float:
        return self.arguments + self.outputs + self.temporary


@dataclass(frozen=True)
class Bound:
    """The same program compiled with each matmul back end of the target; the largest total is the bound."""

    back_ends: dict[str, Memory]

    @property
    def total(self) -> float:
        """MiB."""
        return max(m.total for m in self.back_ends.values())

    def fits(self, target: Target) -> bool:
        return self.total <= target.budget and not any(m.warned for m in self.back_ends.values())


def bound(target: Target, program: Any, *arguments: Any) -> Bound:
    """Device memory of a jitted program, compiled for the target on arguments of which only shape and dtype count.

    Raises UserError where JAX's CUDA plugin or ptxas is not installed.
    """
    lowered = program.lower(*_on(_device(target), arguments))
    names = ["triton", "cublas"] if float(target.compute_capability) >= 8.0 else ["cublas"]
    return Bound({name: _measured(target, lowered, BACK_ENDS[name]) for name in names})


def _device(target: Target) -> SingleDeviceSharding:
    if not environment.has_cuda_plugin():
        raise UserError(
            "planning needs JAX's CUDA plugin: run it with `uv run --extra gpu-plan python -m moe_jax plan`"
        )
    from jax.experimental import topologies

    # One host, one process, one device.
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target.text)
    return SingleDeviceSharding(topology.devices[0])


def _on(sharding: SingleDeviceSharding, tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _measured(target: Target, lowered: Any, options: dict[str, bool]) -> Memory:
    """Compile, or look up what an earlier process found for the same program, target, options and compiler."""
    text = "\0".join([lowered.as_text(), target.text, repr(options), importlib.metadata.version("jaxlib")])
    path = environment.cache_dir() / "plans" / (hashlib.sha256(text.encode()).hexdigest() + ".json")
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Memory(**json.loads(path.read_text()))
    memory = _compile(lowered, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(memory)))
    draft.replace(path)
    return memory


def _compile(lowered: Any, options: dict[str, bool]) -> Memory:
    try:
        with _stderr() as said:
            compiled = lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "No PTX compilation provider" in str(error) or "libdevice not found" in str(error):
            raise UserError(
                "planning needs ptxas: run it with `uv run --extra gpu-plan python -m moe_jax plan`"
            ) from error
        raise
    # An argument without its sharding would compile for the CPU, silently. Only GPU programs have queues.
    if "operation_queue_id" not in compiled.as_text():
        raise AssertionError("compiled for the CPU, not for the target")
    m = compiled.memory_analysis()
    return Memory(
        m.argument_size_in_bytes / MIB,
        (m.output_size_in_bytes - m.alias_size_in_bytes) / MIB,
        m.temp_size_in_bytes / MIB,
        _OVER_BUDGET in "".join(said),
    )


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """What C++ code writes to the process's stderr meanwhile. XLA warns there only, and of much that is no matter."""
    said: list[str] = []
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read())
