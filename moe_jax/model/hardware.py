"""A device as precision and programs see it: the matrix units of a card, the bfloat16 units of a CPU."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.system import machine

CPU_INFO = Path("/proc/cpuinfo")
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
        """The card that a `jax.Device` or a `planning.target.Target` stands for."""
        capability = str(getattr(device, "compute_capability", ""))
        number = float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None  # an AMD card says "gfx942"
        return cls(device.platform, str(device.device_kind), number)

    @property
    def tensor_cores(self) -> bool:
        """Whether an NVIDIA card has units for products of bfloat16 or float16 matrices.

        They came with compute capability 7.0. Turing's small chips report 7.5 and have none; there cuBLAS imitates
        them, and float16 is many times slower than float32 (issues 1675 and 849 of LeelaChessZero/lc0: a GTX 1650
        reached 535 positions a second in float16 and 2,303 in float32).
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

    Their names are read from Linux's /proc/cpuinfo. "" if there are none, or no such file, or if a race shows that they
    are not faster (`system.machine.gain`). With AVX-512 BF16, AMD's Zen 4 reached 401 GFLOP/s in bfloat16 and 193 in
    float32, its Zen 5 960 and 480, but an Intel Xeon whose AMX was hidden 221 and 300.
    """
    try:
        flags = CPU_INFO.read_text().split()
    except OSError:
        return ""
    units = "AMX" if "amx_bf16" in flags else "AVX-512 BF16" if "avx512_bf16" in flags else ""
    return units if units and machine.gain("bfloat16", jax.devices("cpu")[0], units) >= LEAST_GAIN else ""


def float16_is_slow(device: Any) -> bool:
    """Whether a race on a card of this machine shows that its tensor cores do not help. False for a described card,
    which cannot race."""
    return isinstance(device, jax.Device) and machine.gain("float16", device) < LEAST_GAIN
