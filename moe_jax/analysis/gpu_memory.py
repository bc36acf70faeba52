"""Device memory of a compiled program on an NVIDIA GPU that need not be there.

XLA compiles for a GPU from a description of it (`targets/*.txtpb`): no card, driver or CUDA library takes part, only
JAX's CUDA plugin and ptxas (extra `gpu-plan`). The result cannot run, but it says how much memory each of its buffers
takes, which is decided at compile time. What that leaves out is said in `Target.budget`.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.sharding import SingleDeviceSharding

from moe_jax import environment
from moe_jax.config import UserError

MIB = 2**20
PREALLOCATED = 0.75
"""Share of a card's memory that JAX takes at start (XLA_PYTHON_CLIENT_MEM_FRACTION): all that a program gets."""
MARGIN = 0.85
"""Share of that which a plan may use; the rest is for what XLA's plan leaves out."""
BACK_ENDS: dict[str, dict[str, bool]] = {"triton": {}, "cublas": {"xla_gpu_enable_triton_gemm": False}}
"""A card times both for each matrix product when it compiles, and may mix them; a plan compiles each alone."""
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


def targets() -> dict[str, Path]:
    """The descriptions that come with the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "targets").glob("*.txtpb"))}


def load_target(name: str) -> Target:
    """A target by its name, or from a file of the same form."""
    path = targets().get(name, Path(name))
    return Target(path.stem, path.read_text(encoding="utf-8"))


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
    """The same program compiled with each matmul back end; the larger total is the bound."""

    triton: Memory
    cublas: Memory

    @property
    def larger(self) -> Memory:
        return max(self.triton, self.cublas, key=lambda m: m.total)

    @property
    def warned(self) -> bool:
        return self.triton.warned or self.cublas.warned

    def fits(self, target: Target, beside: float = 0.0) -> bool:
        """Whether the program fits, with so many MiB `beside` that live on the device meanwhile."""
        return not self.warned and self.larger.total + beside <= target.budget


def bound(target: Target, program: Any, *arguments: Any) -> Bound:
    """Device memory of a jitted program on abstract arguments, compiled for the target with both back ends.

    Raises UserError where JAX's CUDA plugin or ptxas is not installed.
    """
    lowered = program.lower(*_on(_device(target), arguments))
    return Bound(**{name: _measured(target, lowered, options) for name, options in BACK_ENDS.items()})


def _device(target: Target) -> SingleDeviceSharding:
    if not environment.has_cuda_plugin():
        raise UserError("planning needs JAX's CUDA plugin: run it with `uv run --extra gpu-plan python -m moe_jax plan`")
    from jax.experimental import topologies

    # One host, one process, one device.
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target.text)
    return SingleDeviceSharding(topology.devices[0])


def _on(sharding: SingleDeviceSharding, tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _measured(target: Target, lowered: Any, options: dict[str, bool]) -> Memory:
    """Compile, or look up what an earlier process found for the same program, target, options and compiler."""
    text = "\0".join([lowered.as_text(), target.text, repr(options), jaxlib.__version__])
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
            raise UserError("planning needs ptxas: run it with `uv run --extra gpu-plan python -m moe_jax plan`") from error
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
