"""What must be settled before jax is imported: the platform, the allocator, the compilation cache.

Standard library only, until all is set. Every program calls `prepare` once its arguments are accepted.
"""

import importlib.util
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

GPU_TARGETS = Path(__file__).parent / "analysis" / "targets"
"""Descriptions of GPUs for `python -m moe_jax plan`, a file each."""

SMALL_CARD_MIB = 8500
"""Cards up to 8 GB: above, JAX's own 75 % leaves enough on both sides."""
CUDA_MIB = 400
"""Left for what lies outside JAX's block: the CUDA context, loaded kernels, the libraries' handles and workspaces."""

_TUNABLES = ":".join(
    f"glibc.malloc.{name}" for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=100000000000", "arena_max=1")
)

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def cache_dir() -> Path:
    """Where prepared data and compiled programs are kept: MOE_JAX_CACHE, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("MOE_JAX_CACHE") or platformdirs.user_cache_path("moe-jax"))


def has_nvidia_card() -> bool:
    """Whether a driver has made an NVIDIA card visible."""
    return any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version"))


def has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))


def prepare(deterministic: bool = False) -> list[str]:
    """Set the environment for jax; returns notes worth printing. May start the program anew (see `_keep_memory`).

    `deterministic` keeps XLA from programs whose bits differ from run to run on a GPU (atomic additions, and kernels
    chosen by a race).
    """
    notes: list[str] = []
    if deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    if "JAX_PLATFORMS" not in os.environ:
        if has_nvidia_card() and not has_cuda_plugin():
            notes.append(
                "an NVIDIA card is here, but not JAX's plugin for it: `uv run --extra cuda12 ...` uses the card"
            )
        if not (has_nvidia_card() and has_cuda_plugin()):
            os.environ["JAX_PLATFORMS"] = "cpu"  # a plugin without a card prints a traceback at import
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        _keep_memory()
    else:
        notes += _share_card()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # its list of fonts, else in the home folder
    from moe_jax import compilation_cache  # imports jax: from here on the environment is read

    compilation_cache.install()
    return notes


def _share_card() -> list[str]:
    """Choose how much of a small card JAX takes at start, unless the user has.

    JAX takes 75 % of a card in one block, which keeps it from fragmenting, and a program gets no more than that
    block. On a small card with nothing else on it that gives away a fifth of the memory, and with a display on it the
    block may not be had at all. So the share is set from what is free now, as the driver's nvidia-smi says.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ or os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == "false":
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        total, free = (float(mib) for mib in answer.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []
    if total > SMALL_CARD_MIB:
        return []
    share = memory_share(total, free)
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.2f}"
    return [
        f"small card: {free:,.0f} of {total:,.0f} MiB are free; JAX takes {share:.0%} "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION overrides)"
    ]


def memory_share(total: float, free: float) -> float:
    """Share of a card for JAX, in whole hundredths: what is free, less what CUDA needs beside it."""
    return math.floor(100 * min(max((free - CUDA_MIB) / total, 0.1), 0.9)) / 100


def _keep_memory() -> None:
    """Start the program anew with an allocator that keeps its memory, where glibc offers that.

    XLA's CPU client allocates the temporary buffers of a program at each call. By default glibc gets them fresh
    from the kernel and gives them back, so every step of training pays for faulting in and zeroing all its pages:
    measured on preset nano, a third of the time. One heap for all threads: by default most threads have their own, and
    orbax starts new threads at each save. On nano that held 110 MB more, which grew with every save, and made a step
    8 % slower. glibc reads these settings at the start of a process only.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ or not sys.orig_argv[0]:
        return
    os.environ["GLIBC_TUNABLES"] = _TUNABLES
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
