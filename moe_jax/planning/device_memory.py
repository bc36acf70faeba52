"""Device memory and predicted time of a compiled program on an NVIDIA GPU that need not be there.

XLA can compile for a GPU from a description (`targets/*.txtpb`). This needs no card, no driver and no CUDA library,
only JAX's CUDA plugin and ptxas (extra `gpu-plan`). The compiled program cannot run here, but it says how much memory
each of its buffers takes, which is decided at compile time. `Target.budget` says which memory this leaves out. From the
kernels of the compiled program `roofline.py` predicts its time.
"""

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import jax
from jax.sharding import SingleDeviceSharding

from moe_jax.config import UserError
from moe_jax.planning.plan_cache import looked_up
from moe_jax.planning.roofline import Prediction, Rates, predict
from moe_jax.planning.target import Target
from moe_jax.system.environment import MIB, has_cuda_plugin
from moe_jax.system.hlo_kernels import read_kernels

BACK_ENDS: dict[str, dict[str, bool]] = {"triton": {}, "cublas": {"xla_gpu_enable_triton_gemm": False}}
"""The back ends for matrix products, with their compiler options. On a card of compute capability 8.0 or more XLA times
both back ends when it compiles, and may mix them. A plan compiles each back end alone. Older cards have cuBLAS only."""
CODE_NOT_RUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of every program that is compiled for a described GPU. The machine code of its kernels never runs, so it need
not be fast. The optimised HLO and the memory are decided before, and stay the same."""
MISSING_PTXAS = ("No PTX compilation provider", "libdevice not found")
"""What XLA's error says if ptxas is missing."""
NO_PTXAS = "planning needs ptxas: run it with `uv run --extra gpu-plan python -m moe_jax plan`"
CUDNN = 91000
"""The version of cuDNN that a described card has: 9.10."""
_OVER_BUDGET = "Can't reduce memory use below"


@dataclass(frozen=True)
class Memory:
    """The device memory of one compiled program, in MiB."""

    arguments: float
    outputs: float
    """Outputs, without those that reuse the memory of a donated argument."""
    temporary: float
    warned: bool
    """XLA warned that it could not bring the program below its own memory limit."""
    prediction: Prediction | None = None
    """The predicted time. None if the program has a loop whose number of passes the compiler does not know."""

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

    @property
    def prediction(self) -> Prediction | None:
        """Of the slower back end. None if it has none."""
        found = [m.prediction for m in self.back_ends.values() if m.prediction is not None]
        return max(found, key=lambda p: p.milliseconds, default=None)

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
    arguments = _on(SingleDeviceSharding(gpu_devices(target)[0]), arguments)
    with for_described_gpu():
        return program.lower(*arguments)


@contextlib.contextmanager
def for_described_gpu() -> Iterator[None]:
    """The context in which a program for a described card is lowered.

    To lower a kernel in Pallas, jax asks for the name of the card, and knows some names only. It needs the name only
    for dtypes of 8 bits, which this project's kernels do not use. So one name serves for all cards.

    To lower cuDNN's attention, jax asks the library for its version, although XLA compiles the call without it. So the
    question has an answer here, and a plan needs no library of CUDA.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    stand_in = jax.sharding.AbstractDevice("NVIDIA A10", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=stand_in)
    with mock.patch.object(cudnn, "check_cudnn_version", return_value=CUDNN), jax.sharding.use_abstract_mesh(mesh):
        yield


def gpu_devices(target: Target, topology: str = "1x1x1") -> list[Any]:
    """Descriptions of cards, for XLA's compiler. `topology` has the numbers of slices, of hosts in a slice, and of
    cards in a host.

    Raises UserError if JAX's CUDA plugin is not installed, or if XLA cannot read the target.
    """
    if not has_cuda_plugin():
        raise UserError(
            "planning needs JAX's CUDA plugin: run it with `uv run --extra gpu-plan python -m moe_jax plan`"
        )
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="cuda", topology=topology, target_config=target.text)
    except (RuntimeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"--gpu {target.name}: XLA cannot read this description ({cause}); correct it") from None
    return list(found.devices)


def _on(sharding: SingleDeviceSharding, tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _measured(target: Target, lowered: Any, options: dict[str, bool]) -> Memory:
    """Compile; or read the result of an earlier process for the same program, target, options and compiler version."""
    rates = Rates.of(target)
    parts = [lowered.as_text(), target.text, repr(options), repr(rates), importlib.metadata.version("jaxlib")]
    return looked_up(parts, lambda: _compile(lowered, options, rates), asdict, _memory)


def _memory(kept: dict[str, Any]) -> Memory:
    """From JSON."""
    prediction = kept.pop("prediction")
    return Memory(**kept, prediction=prediction and Prediction(**prediction))


def _compile(lowered: Any, options: dict[str, bool], rates: Rates) -> Memory:
    try:
        with collected_stderr() as said:
            compiled = lowered.compile(compiler_options=CODE_NOT_RUN | options)
    except jax.errors.JaxRuntimeError as error:
        if any(cause in str(error) for cause in MISSING_PTXAS):
            raise UserError(NO_PTXAS) from error
        raise
    # If an argument had no sharding, XLA would silently compile for the CPU. Only GPU programs name operation queues.
    text = compiled.as_text()
    if "operation_queue_id" not in text:
        raise AssertionError("compiled for the CPU, not for the target")
    prediction = None
    with contextlib.suppress(ValueError):  # a loop of unknown length, as evaluation and prefill have
        prediction = predict(read_kernels(text), rates)
    m = compiled.memory_analysis()
    return Memory(
        m.argument_size_in_bytes / MIB,
        (m.output_size_in_bytes - m.alias_size_in_bytes) / MIB,
        m.temp_size_in_bytes / MIB,
        _OVER_BUDGET in "".join(said),
        prediction,
    )


@contextlib.contextmanager
def collected_stderr() -> Iterator[list[str]]:
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
