"""This machine: its description, and programs that measure its matmul rate and memory bandwidth.

A benchmark measures these limits in the same run as the times that it compares with them.
"""

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.system.limits import usable_cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
MATMUL_SIZES = (1024, 2048, 4096)
READ_BYTES = 512 * 2**20
"""Bytes of the array that is read to measure memory bandwidth. It is far larger than any cache."""


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def matmuls(dtype: str, sizes: tuple[int, ...] = MATMUL_SIZES) -> dict[str, tuple[Callable[[], Any], float]]:
    """Name -> (function that computes a square matrix product, its floating-point operations)."""
    product = jax.jit(jnp.matmul)

    def of(size: int) -> Callable[[], Any]:
        a = jnp.ones((size, size), dtype)
        return lambda: product(a, a)

    return {f"matmul {n}": (of(n), 2.0 * n**3) for n in sizes}


def memory_read_benchmark() -> tuple[Callable[[], Any], float]:
    """(function that sums a large float32 array, the bytes that it reads)."""
    array = jnp.ones(READ_BYTES // 4, jnp.float32)
    total = jax.jit(lambda x: x.reshape(-1, 1024).sum(0))
    return lambda: total(array), float(READ_BYTES)


def describe() -> dict[str, Any]:
    """Machine, package versions and commit, to be saved with a measurement."""
    device = jax.devices()[0]
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": usable_cores(),
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _commit(),
    }


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name with its family and model: many generations share one name."""
    try:
        pairs = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return platform.processor()
    facts = {name.strip(): value.strip() for name, _, value in reversed(list(pairs))}
    name = facts.get("model name") or platform.processor()
    if "cpu family" in facts and "model" in facts:
        return f"{name} (family {facts['cpu family']}, model {facts['model']})"
    return name


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None
