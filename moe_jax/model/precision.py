"""The precision policy: which dtype computes and stores what, and why.

`choose_policy` decides the compute precision, from `ExecutionConfig.compute_dtype` and the device. `writing_policy`
decides it for texts that are written token by token. The compute precision is the dtype of activations and matrix
products; weights are cast to it before they are multiplied. A product in float32 is never rounded to TF32
(`dot_precision`). Norm statistics, softmax, router and loss are computed in at least float32 (`at_least_float32`),
whatever the policy is. Parameters are stored in float32. With `TrainConfig.param_dtype` bfloat16, matrices are stored
in bfloat16 (`to_param_dtype`). Their updates are then computed in float32, and the sums are rounded stochastically
(`stochastic_round`).
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Key

from moe_jax.config import ComputeDtype, ParamDtype
from moe_jax.system import machine

LEAST_GAIN = 1.2
"""How many times as fast as float32 a narrower dtype must be multiplied. A step has other work too, and conversions
that only the narrower dtype needs."""
_TURING_WITHOUT_TENSOR_CORES = re.compile(
    r"\bGTX 16\d\d\b|\bT(400|500|550|600|1000|1200|2000)\b|\bMX(450|550)\b|\bCMP 30HX\b", re.IGNORECASE
)
"""Cards with the chips TU116 and TU117. They report compute capability 7.5 as all Turing cards do."""


@dataclass(frozen=True)
class Card:
    """A device that programs are compiled for. It may be the description of a card that this machine does not have."""

    platform: str
    """As `jax.Device.platform` says it: cpu, gpu, tpu."""
    name: str
    """As `jax.Device.device_kind` says it."""
    capability: float | None
    """Compute capability of an NVIDIA card, such as 8.6. None for anything else."""

    @classmethod
    def of(cls, device: Any) -> "Card":
        """The card that a `jax.Device` is, or that an object with its attributes describes."""
        capability = str(getattr(device, "compute_capability", ""))
        number = float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None  # an AMD card says "gfx942"
        return cls(device.platform, str(device.device_kind), number)

    @property
    def tensor_cores(self) -> bool:
        """Whether an NVIDIA card has units for products of bfloat16 or float16 matrices.

        They came with compute capability 7.0. Turing's small chips report 7.5 and have none; there cuBLAS imitates
        them, and float16 is many times slower than float32 (issues 1675 and 849 of LeelaChessZero/lc0).
        """
        if self.capability is None or self.capability < 7.0:
            return False
        return not _TURING_WITHOUT_TENSOR_CORES.search(self.name)

    @property
    def bfloat16_units(self) -> bool:
        """Whether an NVIDIA card multiplies bfloat16 in units of its own: from compute capability 8.0 (Ampere) on."""
        return self.tensor_cores and self.capability is not None and self.capability >= 8.0


def cpu_bfloat16_units() -> str:
    """The units with which this processor multiplies bfloat16 faster than float32: "AMX" or "AVX-512 BF16".

    "" if there are none, or Linux's /proc/cpuinfo is missing, or a race shows that they are not faster
    (`system.machine.bfloat16_gain`), as they are not on an Intel Xeon whose AMX is hidden.
    """
    flags = machine.processor_flags()
    units = "AMX" if "amx_bf16" in flags else "AVX-512 BF16" if "avx512_bf16" in flags else ""
    return units if units and machine.bfloat16_gain(units) >= LEAST_GAIN else ""


_COMPUTED = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Policy:
    """The compute precision of a run, and the reason for it, which is printed."""

    compute: str
    """`float32`, `bfloat16` or `float16`."""
    reason: str

    @property
    def loss_scaling(self) -> bool:
        """Whether the loss is scaled. Otherwise float16 gradients underflow: the smallest normal float16 is 6e-5."""
        return self.compute == "float16"

    def __str__(self) -> str:
        return f"{self.compute} ({self.reason})"


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32, or float64 where `dtype` is: the precision of statistics, softmax, router and loss."""
    return jnp.promote_types(dtype, jnp.float32)


def dot_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The precision of a matrix product whose operands have this dtype: HIGHEST from float32 on.

    At JAX's default precision, a GPU of compute capability 8.0 or more rounds float32 operands to TF32, which keeps 10
    bits of the fraction instead of 23. Narrower operands are not rounded, so they need no choice (None). A CPU computes
    the same bits either way.
    """
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def choose_policy(kind: ComputeDtype, device: Any = None, kept: str = "") -> Policy:
    """The policy for a precision. `auto` takes the one that a resumed run has `kept`, or else chooses it from the
    device (the first device unless given).

    A GPU computes in the narrowest dtype that its matrix units take (`Card`): bfloat16 from compute capability 8.0 on,
    float16 on older cards with tensor cores, float32 on cards without. A CPU with units for bfloat16 takes it if a race
    shows that they are faster (`cpu_bfloat16_units`). Other CPUs compute bfloat16 in float32.
    `benchmarks/performance.md` has the times of a step.
    """
    if kind != "auto":
        return Policy(kind, "asked for with --precision")
    if kept in _COMPUTED:
        return Policy(kept, "kept from the start of the run; --precision changes it")
    device = device or jax.devices()[0]
    card = Card.of(device)
    if card.platform == "cpu":
        if units := cpu_bfloat16_units():
            return Policy("bfloat16", f"a CPU with bfloat16 matrix units, {units}")
        return Policy("float32", "a CPU without fast bfloat16 matrix units")
    if card.capability is None:
        return Policy("bfloat16", f"{card.name}: an accelerator other than CUDA")
    if card.bfloat16_units:
        return Policy("bfloat16", f"{card.name}: compute capability {card.capability} has bfloat16 units")
    if card.tensor_cores:
        why = f"compute capability {card.capability} has no bfloat16 units; dynamic loss scaling is on"
        return Policy("float16", f"{card.name}: {why}")
    return Policy("float32", f"{card.name}: has no tensor cores, so float16 would be slower")


def writing_policy(kind: ComputeDtype, device: Any = None) -> Policy:
    """The policy of a model that writes texts token by token. It is that of `choose_policy`, but on a CPU `auto` is
    float32.

    A product of one row takes as long as reading its matrix, so units for bfloat16 cannot help. Weights of half the
    size can, on a processor that converts them fast enough.
    """
    if kind == "auto" and Card.of(device or jax.devices()[0]).platform == "cpu":
        return Policy("float32", "a CPU writes texts in float32")
    return choose_policy(kind, device)


def to_param_dtype(params: Any, dtype: ParamDtype) -> Any:
    """Parameters as they are kept between steps: vectors (norms, biases) as they are, matrices in `dtype`."""
    return jax.tree.map(lambda p: p.astype(dtype) if dtype != "float32" and p.ndim >= 2 else p, params)


def stochastic_round(x: Float32[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """Round x to one of the two nearest bfloat16 numbers, at random, with mean x (Gupta et al. 2015, section 3; derived
    in chapter 17 of `foundation`).

    bfloat16 is float32 without its last 16 bits. 16 random bits are added to these last 16 bits, which are then cut
    off. The sum carries into the upper bits with the wanted probability. x must be finite.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
