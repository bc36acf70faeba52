"""NVIDIA GPUs that need not be there: their descriptions (`gpus/*.txtpb`), and programs compiled for them.

XLA can compile for a GPU from a description. This needs no card, no driver and no CUDA library, only JAX's CUDA plugin
and ptxas (extra `gpu-plan`). The compiled program cannot run here, but it says how much memory each of its buffers
takes, which is decided at compile time. It uses parts of jax that are not public, so it is no part of the package.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.sharding import SingleDeviceSharding

from moe_jax.config import ConfigError, UserError
from moe_jax.model.precision import Card
from moe_jax.planning.plans import KnownCard
from moe_jax.system.environment import has_cuda_plugin
from moe_jax.training.fit import program_mib

GPUS = Path(__file__).parent / "gpus"
"""Folder with one description file for each GPU: the text form of stream_executor.GpuTargetConfigProto."""
HOW = "run it with `uv run --isolated --extra gpu-plan`"
CODE_NOT_RUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of every program that is compiled for a described GPU. The machine code of its kernels never runs, so it need
not be fast. The optimised HLO and the memory are decided before, and stay the same."""
MISSING_PTXAS = ("No PTX compilation provider", "libdevice not found")
"""What XLA's error says if ptxas is missing."""
CUDNN = 91000
"""The version of cuDNN that a described card has: 9.10."""
TENSOR_FMA = {7.0: 512, 7.5: 256, 8.0: 1024, 8.6: 256, 9.0: 2048, 12.0: 256}
"""Dense multiply-adds of bfloat16 or float16, with sums in float32, for each clock and multiprocessor, by compute
capability. From the peaks that the maker states, in TFLOP/s: V100 125 at 1.53 GHz on 80 multiprocessors, RTX 2080 Ti
53.8 at 1.545 GHz on 68, A100 312 at 1.41 GHz on 108, RTX 3080 59.5 at 1.71 GHz on 68, RTX 4090 165 at 2.52 GHz on 128,
H100 SXM 989 at 1.83 GHz on 132, RTX 5090 210 at 2.41 GHz on 170. Cards for workstations with the same capability as a
GeForce card may have twice its rate."""


@dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler sees it. It stands for a `jax.Device` in `moe_jax.model.precision.Card.of`."""

    name: str
    text: str
    platform: str = "gpu"

    @classmethod
    def load(cls, name: str) -> "Target":
        """The target of this name, or else of the file of this path. Raises ConfigError if it describes no GPU."""
        ours = GPUS / f"{name}.txtpb"
        path = ours if ours.is_file() else Path(name)
        if not path.is_file():
            raise ConfigError(f"--gpu {name}: must be one of {', '.join(names())}, or a file like those in {GPUS}")
        target = cls(path.stem, path.read_text(encoding="utf-8"))
        target.facts()  # raises ConfigError if a field is missing
        return target

    def field(self, name: str, form: str = r"[0-9]+(?:\.[0-9]+)?", text: str = "") -> str:
        """The content of a field of this form. Raises ConfigError if the description has none."""
        value = re.search(rf'\b{name}: *"?({form})"?(?![^\s}}])', text or self.text)
        if value is None:
            raise ConfigError(f"--gpu {self.name}: its description has no {name}; the files in {GPUS} show one")
        return value[1]

    @property
    def compute_capability(self) -> str:
        """Such as "8.6". A field that is 0 is left out of the text, and other blocks have `major` and `minor` too."""
        block = re.search(r"\bcuda_compute_capability *\{([^{}]*)\}", self.text)
        minor = re.search(r"\bminor: *([0-9]+)", block[1]) if block else None
        major = self.field("major", "[0-9]+", block[1] if block else " ")
        return f"{major}.{minor[1] if minor else 0}"

    @property
    def device_kind(self) -> str:
        return self.field("device_description_str", '[^"]*')

    def facts(self) -> KnownCard:
        """What the package keeps of a card. Rates are peaks: cores x clock, and for bfloat16 and float16 the units of
        the card's own compute capability, or of the newest older one."""
        capability, clock = self.compute_capability, float(self.field("core_count"))
        clock *= float(self.field("clock_rate_ghz")) * 1e9
        float32 = narrow = 2 * float(self.field("fpus_per_core")) * clock
        if Card.of(self).tensor_cores:
            narrow = 2 * clock * [fma for first, fma in TENSOR_FMA.items() if first <= float(capability)][-1]
        memory, bandwidth = int(self.field("device_memory_size", "[0-9]+")), float(self.field("memory_bandwidth"))
        return KnownCard(self.name, self.device_kind, capability, memory, bandwidth, float32, narrow)


def names() -> list[str]:
    """The names of the described GPUs."""
    return sorted(path.stem for path in GPUS.glob("*.txtpb"))


def bound(target: Target, program: Any, *arguments: Any, most: float) -> float:
    """MiB of a jitted program, compiled for the target with each matmul back end: the largest counts, and the first one
    above `most` is the last, since it decides. Only the arguments' shapes and dtypes matter. Raises UserError."""
    lowered, largest = lower_for(target, program, *arguments), 0.0
    for options in back_ends(target).values():
        largest = max(largest, program_mib(compile_for_gpu(lowered, options)))
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
    """A jitted program, lowered for the target (`jax.stages.Lowered`). It can be compiled here, but not run. Raises
    UserError if JAX's CUDA plugin is not installed."""
    sharding = SingleDeviceSharding(gpu_devices(target)[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    with for_described_gpu():
        return program.lower(*shapes)


def for_described_gpu() -> Any:
    """The context in which a program for a described card is lowered. To lower cuDNN's attention, jax asks the library
    for its version, although XLA compiles the call without it. So the question has an answer here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return mock.patch.object(cudnn, "check_cudnn_version", return_value=CUDNN)


def gpu_devices(target: Target, topology: str = "1x1x1") -> list[Any]:
    """Descriptions of cards, for XLA's compiler. `topology` has the numbers of slices, of hosts in a slice, and of
    cards in a host. Raises UserError if JAX's CUDA plugin is not installed, or if XLA cannot read the target."""
    if not has_cuda_plugin():
        raise UserError(f"compiling for a GPU needs JAX's CUDA plugin: {HOW}")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="cuda", topology=topology, target_config=target.text)
    except (RuntimeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"--gpu {target.name}: XLA cannot read this description ({cause}); correct it") from None
    return list(found.devices)


def compile_for_gpu(lowered: Any, options: dict[str, bool]) -> Any:
    """The compiled program. Raises UserError if ptxas is not installed."""
    try:
        compiled = lowered.compile(compiler_options=CODE_NOT_RUN | options)
    except jax.errors.JaxRuntimeError as error:
        if any(cause in str(error) for cause in MISSING_PTXAS):
            raise UserError(f"compiling for a GPU needs ptxas: {HOW}") from error
        raise
    # If an argument had no sharding, XLA would silently compile for the CPU. Only GPU programs name operation queues.
    if "operation_queue_id" not in compiled.as_text():
        raise AssertionError("compiled for the CPU, not for the target")
    return compiled
