"""The machine's own limits, measured in the same run as what is compared with them."""

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.training.checkpoint import versions

MATMUL_SIZES = (1024, 2048, 4096)
READ_BYTES = 512 * 2**20
"""Of the array whose reading measures memory bandwidth: far larger than any cache."""


def matmuls(dtype: str, sizes: tuple[int, ...] = MATMUL_SIZES) -> dict[str, tuple[Callable[[], Any], float]]:
    """Name -> (a square matrix product, its operations)."""
    product = jax.jit(jnp.matmul)

    def of(size: int) -> Callable[[], Any]:
        a = jnp.ones((size, size), dtype)
        return lambda: product(a, a)

    return {f"matmul {n}": (of(n), 2.0 * n**3) for n in sizes}


def read() -> tuple[Callable[[], Any], float]:
    """Summing a large float32 array, and the bytes that it reads."""
    array = jnp.ones(READ_BYTES // 4, jnp.float32)
    total = jax.jit(lambda x: x.reshape(-1, 1024).sum(0))
    return lambda: total(array), float(READ_BYTES)


def describe() -> dict[str, Any]:
    """Machine, versions and commit, for the record."""
    device = jax.devices()[0]
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    root = Path(__file__).parents[3]
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None
