"""This machine: its name, times measured on it, its matmul rate and its memory bandwidth.

The speed of a shared machine drifts by a factor of two within minutes. So times are comparable only if they were
measured side by side. `alternate` runs all candidates in turn, round after round, and takes medians. It waits for the
result of every run. A benchmark measures the machine's limits in the same run as the times that it compares with them.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.system.environment import usable_cores
from moe_jax.system.files import cached_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
CUDA = ("jax-cuda{}-plugin", "nvidia-cudnn-cu{}", "nvidia-cublas-cu{}", "nvidia-cuda-nvcc-cu{}")
"""Packages that compute on a card, by the version of CUDA."""
CPU_INFO = Path("/proc/cpuinfo")
MATMUL_SIZES = (1024, 2048, 4096)
READ_BYTES = 512 * 2**20
"""Bytes of the array that is read to measure memory bandwidth. It is far larger than any cache."""
SIZE, LARGE_SIZE = 1024, 4096
"""Rows and columns of the matrices that compare two precisions, on a CPU and elsewhere. On a card a launch must not
count."""
ROUNDS = 11
WIDE_VECTORS: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}
"""XLA's documentation does not name this option."""


@cache
def wide_vectors() -> dict[str, Any] | None:
    """Options of XLA for a program that is bound by converting weights: vectors of 512 bits, on a CPU that has them.
    XLA takes 256 bits unless it is asked. None if this XLA does not know the option."""
    if jax.default_backend() != "cpu" or "avx512f" not in processor_flags():
        return None
    try:
        jax.jit(lambda: 0, compiler_options=WIDE_VECTORS).lower().compile()
    except RuntimeError:
        return None
    return WIDE_VECTORS


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes. Of those for a card, the ones that are installed."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in (package.format(cuda) for package in CUDA for cuda in (12, 13)):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def matmuls(dtype: str, sizes: tuple[int, ...] = MATMUL_SIZES) -> dict[str, tuple[Callable[[], Any], float]]:
    """Name -> (function that computes a square matrix product, its floating-point operations). A product of float32 is
    not rounded to TF32."""
    product = jax.jit(partial(jnp.matmul, precision="highest" if dtype == "float32" else None))

    def of(size: int) -> Callable[[], Any]:
        a = jnp.ones((size, size), dtype)
        return lambda: product(a, a)

    return {f"matmul {n}": (of(n), 2.0 * n**3) for n in sizes}


def memory_read_benchmark() -> tuple[Callable[[], Any], float]:
    """(function that sums a large float32 array, the bytes that it reads)."""
    array = jnp.ones(READ_BYTES // 4, jnp.float32)
    total = jax.jit(lambda x: x.reshape(-1, 1024).sum(0))
    return lambda: total(array), float(READ_BYTES)


def processor() -> str:
    """The processor's name with its family and model: many generations share one name."""
    facts = _processor_facts()
    name = facts.get("model name") or platform.processor()
    if "cpu family" in facts and "model" in facts:
        return f"{name} (family {facts['cpu family']}, model {facts['model']})"
    return name


def processor_flags() -> list[str]:
    """Names of what the processor's cores can do, such as avx512f. Empty where Linux's /proc/cpuinfo is missing."""
    facts = _processor_facts()
    return facts.get("flags", facts.get("Features", "")).split()


def _processor_facts() -> dict[str, str]:
    """What /proc/cpuinfo says of the first core."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}


class Times(NamedTuple):
    """Seconds of one candidate, over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Interquartile range / median. 0.1: the middle half of the times spans 10 % of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median)


class Measured(float):
    """Seconds that a candidate has measured itself, for example in another process. Replaces the measured time."""


def alternate(candidates: dict[str, Callable[[], Any]], rounds: int, warmups: int = 2) -> dict[str, Times]:
    """Time each candidate once a round, for `rounds` rounds after `warmups` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for n in range(warmups + rounds):
        for name, run in candidates.items():
            begin = time.perf_counter()
            result = jax.block_until_ready(run())
            elapsed = time.perf_counter() - begin
            if n >= warmups:
                seconds[name].append(float(result) if isinstance(result, Measured) else elapsed)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def matmul_rate(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations per second of a square matrix product on the first device, in the fastest of `repeats`
    runs."""
    ((name, (run, flops)),) = matmuls(dtype, (size,)).items()
    return flops / min(alternate({name: run}, repeats, warmups=1)[name].seconds)


@cache
def bfloat16_gain(units: str) -> float:
    """How many times as fast this processor multiplies matrices of bfloat16 as of float32, with these matrix units.

    The medians of ROUNDS turns count, of the time of all its cores. Other programs on the same cores hardly change it:
    beside four programs on two cores, the clock once gave a ratio of 1.02, and this time 1.90 as on a quiet machine.
    The result is kept in the cache folder. It is measured again for another processor, other units, another number of
    cores or another jaxlib.
    """
    parts = [processor(), units, str(usable_cores()), importlib.metadata.version("jaxlib")]
    return cached_json("races", parts, _measured_gain)


def _measured_gain() -> float:
    def timed(run: Callable[[], Any]) -> Measured:
        begin = time.process_time()
        jax.block_until_ready(run())
        return Measured(time.process_time() - begin)

    with jax.default_device(jax.devices("cpu")[0]):
        products = {dtype: matmuls(dtype, (SIZE,))[f"matmul {SIZE}"][0] for dtype in ("float32", "bfloat16")}
        times = alternate({dtype: partial(timed, run) for dtype, run in products.items()}, ROUNDS)
    return times["float32"].median / times["bfloat16"].median
