"""The device memory of a compiled program, also on NVIDIA GPUs that need not be there.

XLA can compile for a GPU from a description (`targets/*.txtpb`). This needs no card, no driver and no CUDA library,
only JAX's CUDA plugin and ptxas (extra `gpu-plan`). The compiled program cannot run here, but it says how much memory
each of its buffers takes, which is decided at compile time. `Target.budget` says which memory this leaves out.

What a plan has compiled is kept for later plans: one small JSON file for each program, in the user's cache folder.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import jax
from jax.sharding import SingleDeviceSharding

from moe_jax.config import UserError
from moe_jax.planning.target import Target
from moe_jax.system.environment import MIB, has_cuda_plugin
from moe_jax.system.files import cached_json

CODE_NOT_RUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of every program that is compiled for a described GPU. The machine code of its kernels never runs, so it need
not be fast. The optimised HLO and the memory are decided before, and stay the same."""
MISSING_PTXAS = ("No PTX compilation provider", "libdevice not found")
"""What XLA's error says if ptxas is missing."""
HOW = "run it with `uv run --isolated --extra gpu-plan python -m moe_jax plan`"
CUDNN = 91000
"""The version of cuDNN that a described card has: 9.10."""


@dataclass(frozen=True)
class Memory:
    """The device memory of one compiled program, in MiB."""

    arguments: float
    outputs: float
    """Outputs, without those that reuse the memory of a donated argument."""
    temporary: float

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """By XLA's plan of the buffers of a compiled program. Of a program for a mesh: the memory of one device."""
        m = compiled.memory_analysis()
        outputs = m.output_size_in_bytes - m.alias_size_in_bytes
        return cls(m.argument_size_in_bytes / MIB, outputs / MIB, m.temp_size_in_bytes / MIB)

    @property
    def total(self) -> float:
        return self.arguments + self.outputs + self.temporary


def bound(target: Target, program: Any, *arguments: Any, most: float) -> float:
    """MiB of a jitted program, compiled for the target with each matmul back end: the largest counts, and the first one
    above `most` is the last, since it decides. Only the arguments' shapes and dtypes matter.

    Raises UserError if JAX's CUDA plugin or ptxas is not installed.
    """
    lowered, largest = lower_for(target, program, *arguments), 0.0
    for options in back_ends(target).values():
        largest = max(largest, measured(target, lowered, options).total)
        if largest > most:
            break
    return largest


def back_ends(target: Target) -> dict[str, dict[str, bool]]:
    """The back ends for matrix products, with their compiler options.

    On a card of compute capability 8.0 or more XLA times both back ends when it compiles, and may mix them. A plan
    compiles each back end alone. Older cards have cuBLAS only.
    """
    cublas = {"cublas": {"xla_gpu_enable_triton_gemm": False}}
    return {"triton": {}} | cublas if float(target.compute_capability) >= 8.0 else cublas


def lower_for(target: Target, program: Any, *arguments: Any) -> Any:
    """A jitted program, lowered for the target (`jax.stages.Lowered`). It can be compiled here, but not run.

    Raises UserError if JAX's CUDA plugin is not installed.
    """
    sharding = SingleDeviceSharding(gpu_devices(target)[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    with for_described_gpu():
        return program.lower(*shapes)


@contextlib.contextmanager
def for_described_gpu() -> Iterator[None]:
    """The context in which a program for a described card is lowered.

    To lower cuDNN's attention, jax asks the library for its version, although XLA compiles the call without it. So the
    question has an answer here, and a plan needs no library of CUDA.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with mock.patch.object(cudnn, "check_cudnn_version", return_value=CUDNN):
        yield


def gpu_devices(target: Target, topology: str = "1x1x1") -> list[Any]:
    """Descriptions of cards, for XLA's compiler. `topology` has the numbers of slices, of hosts in a slice, and of
    cards in a host.

    Raises UserError if JAX's CUDA plugin is not installed, or if XLA cannot read the target.
    """
    if not has_cuda_plugin():
        raise UserError(f"planning needs JAX's CUDA plugin: {HOW}")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="cuda", topology=topology, target_config=target.text)
    except (RuntimeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"--gpu {target.name}: XLA cannot read this description ({cause}); correct it") from None
    return list(found.devices)


def measured(target: Target, lowered: Any, options: dict[str, bool], devices: str = "") -> Memory:
    """The memory of a lowered program. A program that an earlier process has compiled in the same way is looked up.

    `devices` describes a mesh of several cards.
    """
    parts = ["memory", lowered.as_text(), target.text, devices, repr(options), importlib.metadata.version("jaxlib")]
    return Memory(**cached_json("plans", parts, lambda: asdict(Memory.of(compile_for_gpu(lowered, options)))))


def compile_for_gpu(lowered: Any, options: dict[str, bool]) -> Any:
    """The compiled program. Raises UserError if ptxas is not installed."""
    try:
        compiled = lowered.compile(compiler_options=CODE_NOT_RUN | options)
    except jax.errors.JaxRuntimeError as error:
        if any(cause in str(error) for cause in MISSING_PTXAS):
            raise UserError(f"planning needs ptxas: {HOW}") from error
        raise
    # If an argument had no sharding, XLA would silently compile for the CPU. Only GPU programs name operation queues.
    if "operation_queue_id" not in compiled.as_text():
        raise AssertionError("compiled for the CPU, not for the target")
    return compiled
