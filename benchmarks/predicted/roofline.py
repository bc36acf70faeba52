"""The time of a program on a GPU that need not be there, predicted from its kernels by a roofline.

Each kernel takes as long as its memory traffic or its matrix products, whichever is longer, and a fixed time for its
launch (Williams et al. 2009, "Roofline", with a launch added). Other arithmetic is free. Kernels follow one another.
Nothing is measured: expect an error of 30 % either way.

The rates are shares of what the card's description states (`planning.card.Peaks`).
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_jax.model.precision import Card
from moe_jax.planning.card import Peaks
from moe_jax.planning.device_memory import back_ends, compile_for_gpu, lower_for
from moe_jax.planning.target import Target
from moe_jax.system.hlo import Dot
from predicted.kernels import Kernel, read_kernels

BANDWIDTH_SHARE = 0.8
"""Share of the stated memory bandwidth that a kernel reaches. Assumed."""
MATMUL_SHARE = 0.7
"""Share of the stated peak that a matrix product reaches. Assumed."""
LAUNCH_SECONDS = 2.5e-6
"""Time of a kernel beside its work. Assumed."""

PARTS = {
    "head and loss": {"head"},
    "experts": {"experts", "shared"},
    "routing": {"router", "dispatch", "combine", "ffn"},
    "attention": {"attention"},
    "optimizer": {"optimizer"},
}
"""Parts of a training step, with the scopes that name their operations. A kernel belongs to the first that fits."""
REST = "embedding, norms, rest"


@dataclass(frozen=True)
class Rates:
    """What a card is assumed to do in a second."""

    bytes: float
    """Bytes read and written."""
    float32: float
    """Floating-point operations of a matrix product whose operands keep all bits of float32."""
    tf32: float
    """The same for float32 operands that are rounded to TF32."""
    narrow: float
    """The same for bfloat16 and float16 operands."""
    launch: float = LAUNCH_SECONDS

    @classmethod
    def of(cls, target: Target) -> "Rates":
        """The rates of a described card."""
        peaks = Peaks.of(target)
        tf32 = peaks.float32
        if Card.of(target).bfloat16_units:  # Ampere brought bfloat16 and TF32
            tf32 = max(tf32, peaks.narrow / 2)
        return cls(BANDWIDTH_SHARE * peaks.bytes, *(MATMUL_SHARE * r for r in (peaks.float32, tf32, peaks.narrow)))

    def of_product(self, dot: Dot) -> float:
        """Operations a second of one product."""
        if dot.operand_dtype != "f32":
            return self.narrow
        return self.float32 if dot.precision == "highest" else self.tf32

    def seconds(self, kernel: Kernel) -> float:
        """Time of all launches of a kernel."""
        memory = (kernel.bytes_read + kernel.bytes_written) / self.bytes
        products = sum(dot.flops / self.of_product(dot) for dot in kernel.dots)
        return kernel.runs * (max(memory, products) + self.launch)


@dataclass(frozen=True)
class Prediction:
    """The kernels, the memory traffic and the time of one program."""

    kernels: int
    traffic_gb: float
    """10^9 bytes, read and written."""
    milliseconds: float
    traffic_by_part: dict[str, float]
    """10^9 bytes of each part (`PARTS`, `REST`)."""
    milliseconds_by_part: dict[str, float]


def predict(kernels: Iterable[Kernel], rates: Rates) -> Prediction:
    """The prediction for the kernels of a program."""
    count, traffic, time = 0, dict.fromkeys((*PARTS, REST), 0.0), defaultdict(float)
    for kernel in kernels:
        part = next((name for name, scopes in PARTS.items() if scopes & kernel.scopes), REST)
        count += kernel.runs
        traffic[part] += kernel.traffic / 1e9
        time[part] += 1e3 * rates.seconds(kernel)
    times = {part: time[part] for part in traffic}
    return Prediction(count, sum(traffic.values()), sum(times.values()), traffic, times)


def predict_program(target: Target, program: Any, *arguments: Any) -> Prediction | None:
    """The prediction for a jitted program on a described card, with the slower of its back ends for matrix products.

    None if the program has a loop of unknown length, as evaluation and prefill have. Raises what `lower_for` raises.
    """
    lowered, rates = lower_for(target, program, *arguments), Rates.of(target)
    found = []
    for options in back_ends(target).values():
        text = compile_for_gpu(lowered, options).as_text()
        with contextlib.suppress(ValueError):
            found.append(predict(read_kernels(text), rates))
    return max(found, key=lambda p: p.milliseconds, default=None)
