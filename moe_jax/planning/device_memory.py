"""Device memory of a compiled program on an NVIDIA GPU that need not be there.

XLA can compile for a GPU from a description (`targets/*.txtpb`). This needs no card, no driver and no CUDA library,
only JAX's CUDA plugin and ptxas (extra `gpu-plan`). The compiled program cannot run here, but it says how much memory
each of its buffers takes, which is decided at compile time. `Target.budget` says which memory this leaves out.
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

from moe_jax.config import UserError
from moe_jax.system.environment import has_cuda_plugin
from moe_jax.system.files import cache_dir, write_atomically
from moe_jax.system.json_text import json_text

GPU_TARGETS = Path(__file__).parent / "targets"
"""Folder with one description file for each GPU."""
MIB = 2**20
PREALLOCATED = 0.75
"""Share of a card's memory that JAX takes at start by default (XLA_PYTHON_CLIENT_MEM_FRACTION). A program gets no more.
`system.environment` may choose another share for a small card; plans do not count on it."""
MARGIN = 0.85
"""Share of JAX's memory that a plan may use. The rest is for memory that XLA's buffer plan leaves out."""
BACK_ENDS: dict[str, dict[str, bool]] = {"triton": {}, "cublas": {"xla_gpu_enable_triton_gemm": False}}
"""The back ends for matrix products, with their compiler options. On a card of compute capability 8.0 or more XLA times
both back ends when it compiles, and may mix them. A plan compiles each back end alone. Older cards have cuBLAS only."""
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
        """The same as `jax.Device.platform`, so that `choose_policy` accepts a target in place of a device."""
        return "gpu"

    @property
    def budget(self) -> float:
        """MiB that a plan may use: 85 % of JAX's share, which is 75 % of the card's memory.

        The other 15 % are for memory outside XLA's buffers, which is not measured here: loaded kernels, handles and
        workspaces of libraries, scratch memory of autotuning, and fragmentation. The CUDA context and a display use the
        25 % of the card that JAX does not take.
        """
        return MARGIN * PREALLOCATED * self.memory / MIB


def load_target(name: str) -> Target:
    """The target of this name that comes with the package, or else the target in the file of this path."""
    ours = GPU_TARGETS / f"{name}.txtpb"
    path = ours if ours.is_file() else Path(name)
    try:
        return Target(path.stem, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"--gpu {name}: is not UTF-8; the files in {GPU_TARGETS} show how a GPU is described") from None


def target_of_device(device: Any) -> Target:
    """The target for a card in this machine, read from its driver."""
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage], there is no public API for it

    name = str(device.device_kind)
    return Target(name, str(_jax.get_topology_for_devices([device]).target_config))


@dataclass(frozen=True)
class Memory:
    """The device memory of one compiled program, in MiB."""

    arguments: float
    outputs: float
    """Outputs, without those that reuse the memory of a donated argument."""
    temporary: float
    warned: bool
    """XLA warned that it could not bring the program below its own memory limit."""

    @property
    def total(self) -> float:
        return self.arguments + self.outputs + self.temporary


@dataclass(frozen=True)
class Bound:
    """The memory of one program, compiled with each matmul back end of the target. The largest total is the bound."""

    back_ends: dict[str, Memory]

    @property
    def total(self) -> float:
        """MiB."""
        return max(m.total for m in self.back_ends.values())

    def fits(self, target: Target) -> bool:
        return self.total <= target.budget and not any(m.warned for m in self.back_ends.values())


def bound(target: Target, program: Any, *arguments: Any) -> Bound:
    """The device memory of a jitted program, compiled for the target. Only the arguments' shapes and dtypes matter.

    Raises UserError if JAX's CUDA plugin or ptxas is not installed.
    """
    lowered = lower_for(target, program, *arguments)
    names = ["triton", "cublas"] if float(target.compute_capability) >= 8.0 else ["cublas"]
    return Bound({name: _measured(target, lowered, BACK_ENDS[name]) for name in names})


def lower_for(target: Target, program: Any, *arguments: Any) -> Any:
    """A jitted program, lowered for the target (`jax.stages.Lowered`). It can be compiled here, but not run.

    Raises UserError if JAX's CUDA plugin is not installed.
    """
    return program.lower(*_on(_device(target), arguments))


def _device(target: Target) -> SingleDeviceSharding:
    if not has_cuda_plugin():
        raise UserError(
            "planning needs JAX's CUDA plugin: run it with `uv run --extra gpu-plan python -m moe_jax plan`"
        )
    from jax.experimental import topologies

    # One host, one process, one device.
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target.text)
    except (RuntimeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"--gpu {target.name}: XLA cannot read this description ({cause}); correct it") from None
    return SingleDeviceSharding(topology.devices[0])


def _on(sharding: SingleDeviceSharding, tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _measured(target: Target, lowered: Any, options: dict[str, bool]) -> Memory:
    """Compile; or read the result of an earlier process for the same program, target, options and compiler version."""
    text = "\0".join([lowered.as_text(), target.text, repr(options), importlib.metadata.version("jaxlib")])
    path = cache_dir() / "plans" / (hashlib.sha256(text.encode()).hexdigest() + ".json")
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Memory(**json.loads(path.read_text()))
    memory = _compile(lowered, options)
    with contextlib.suppress(OSError):  # a cache that cannot be written: it is compiled again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(asdict(memory)), durable=False)
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
    # If an argument had no sharding, XLA would silently compile for the CPU. Only GPU programs name operation queues.
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
    """Collect what C++ code writes to the stderr of the process. XLA warns only there, mostly harmlessly."""
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
