"""The precision policy: which dtype holds what, and why.

The policy chooses the compute precision: the dtype of activations and of the copies of the weights that matrices are
multiplied in. Norm statistics, softmax, router and loss are computed in `at_least_float32` of it, whatever the policy
says. Parameters are stored in float32, or matrices in bfloat16 where `TrainConfig.weights` says so (`stored`): their
steps are then computed in float32 and rounded at random (`round_at_random`).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Key

from moe_jax.config import PrecisionKind, WeightKind

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Policy:
    """Compute precision of a run, with the reason for it, to be printed."""

    compute: str
    """`float32`, `bfloat16` or `float16`."""
    reason: str

    @property
    def loss_scaling(self) -> bool:
        """float16 gradients underflow without a scale: its smallest normal number is 6e-5."""
        return self.compute == "float16"

    def __str__(self) -> str:
        return f"{self.compute} ({self.reason})"


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32, or float64 where `dtype` is: the precision of statistics, softmax, router and loss."""
    return jnp.promote_types(dtype, jnp.float32)


def cpu_bfloat16_units() -> str:
    """The units with which this machine's processor multiplies bfloat16 twice as fast as float32, by what Linux says.

    "" where it has none, and where nobody can be asked. AVX-512 BF16 is such a unit in AMD's family 26 (Zen 5), which
    multiplied 960 GFLOP/s instead of 480 with it. An Intel Xeon whose AMX was hidden multiplied 221 instead of 300;
    AMD's older families have not been measured.
    """
    try:
        info = CPU_INFO.read_text()
    except OSError:
        return ""
    flags, family = info.split(), re.search(r"^cpu family\s*:\s*(\d+)", info, re.MULTILINE)
    if "amx_bf16" in flags:
        return "AMX"
    zen5 = "AuthenticAMD" in flags and family is not None and int(family[1]) >= 26
    return "AVX-512 BF16" if zen5 and "avx512_bf16" in flags else ""


def choose_policy(kind: PrecisionKind, device: Any = None) -> Policy:
    """The policy that was asked for, or for `auto` the one that fits the device (the first, unless given).

    bfloat16 matrix units came with compute capability 8.0 (Ampere). Turing (7.5) has float16 ones only, and XLA
    computes bfloat16 there in float32. A CPU has them or not (`cpu_bfloat16_units`): a step of `seed-158m` took 1.74 s
    in bfloat16 and 3.10 s in float32 with AMX, 1.54 and 2.02 s with AVX-512 BF16, one of `nano` 88 and 120, 63 and
    67 ms. Without them bfloat16 is computed in float32.
    """
    if kind != "auto":
        return Policy(kind, "asked for with --precision")
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        if units := cpu_bfloat16_units():
            return Policy("bfloat16", f"a CPU with bfloat16 matrix units, {units}")
        return Policy("float32", "a CPU without fast bfloat16 matrix units")
    capability = str(getattr(device, "compute_capability", ""))
    if not capability:
        return Policy("bfloat16", f"{device.device_kind}: an accelerator other than CUDA")
    if float(capability) >= 8.0:
        return Policy("bfloat16", f"{device.device_kind}: compute capability {capability} has bfloat16 units")
    return Policy(
        "float16",
        f"{device.device_kind}: compute capability {capability} has no bfloat16 units; dynamic loss scaling is on",
    )


def stored(params: Any, weights: WeightKind) -> Any:
    """Parameters as they are kept between steps: vectors (norms, biases) as they are, matrices in `weights`."""
    return jax.tree.map(lambda p: p.astype(weights) if weights != "float32" and p.ndim >= 2 else p, params)


def round_at_random(x: Float32[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """To one of the two bfloat16 around x, at random such that the mean is x (Gupta et al. 2015, section 3).

    bfloat16 is float32 without its last 16 bits. Adding 16 random bits before cutting them off carries into the rest
    with the probability that is wanted. x is finite.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
