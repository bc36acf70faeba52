"""The limits of this process, and settings that must be made before jax is imported: the platform, the allocator, the
compilation cache.

Every program calls `prepare_environment` once its arguments are accepted. Standard library only.
"""

import ctypes
import importlib.util
import math
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

from moe_jax.system.errors import UserError
from moe_jax.system.files import cache_dir

GIB, MIB = 2**30, 2**20
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SMALL_CARD_MIB = 8500
"""A card with at most this memory is small: JAX may take nine tenths. On a larger card, JAX's default share of 75 %
leaves enough for JAX and for other programs."""
JAX_SHARE = 0.75
SHARE = "XLA_CLIENT_MEM_FRACTION"
CUDA_MIB = 400
"""MiB that are kept free for memory outside JAX's block: the CUDA context, loaded kernels, handles and workspaces."""

ADDRESS_SPACE = 3 * GIB // 2
"""The least that `ulimit -v` must leave."""

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
"""Parameters of glibc's `mallopt`."""
_HUGE_PAGE, _HUGE_PAGES = 2 * MIB, 14
"""Bytes of a huge page, and `madvise`'s number for MADV_HUGEPAGE."""
LARGE_BLOCK = 32 * MIB
"""The largest threshold that glibc takes."""


def usable_cores() -> int:
    """Processor cores that this process may use; 1 if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int | None:
    """Bytes of memory of this machine, or of the container that this process runs in. None if unknown."""
    known = []
    with suppress(ValueError, OSError, AttributeError):  # not on Windows
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CGROUPS:
        with suppress(OSError, ValueError):  # "max" is no limit
            known.append(int(path.read_text()))
    return min(known, default=None)


def has_nvidia_card() -> bool:
    """Whether a driver has made an NVIDIA card visible."""
    return any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version"))


def ask_nvidia_smi(*fields: str) -> list[str] | None:
    """What the driver's program says of the first card, without units. None if it does not answer."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        values = [value.strip() for value in answer.splitlines()[0].split(",")]
        return values if len(values) == len(fields) else None  # it may say that it found no card
    return None


def has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))


def runs_on_cpu() -> bool:
    """Whether jax computes, or will compute, on the CPU: as JAX_PLATFORMS says, else where there is no usable card."""
    # JAX takes an empty variable for one that is not set.
    return (os.environ.get("JAX_PLATFORMS") or ("" if has_nvidia_card() and has_cuda_plugin() else "cpu")) == "cpu"


def unused_card(platform: str) -> list[str]:
    """A note if jax computes on the CPU although this machine seems to have an NVIDIA card. Empty otherwise.

    `platform` is the platform of jax's first device. `prepare_environment` may have set JAX_PLATFORMS itself, so the
    variable alone does not say why the card is not used.
    """
    if platform != "cpu" or not has_nvidia_card():
        return []
    if not has_cuda_plugin():
        why = "JAX's CUDA plugin is not installed; start with `uv run --extra cuda12 ...`"
    elif os.environ.get("JAX_PLATFORMS"):
        why = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} is set; unset it"
    else:
        why = "JAX's CUDA plugin found no card that it can use; see docs/gpu.md, section At home"
    return [f"this computes on the CPU, although this machine seems to have an NVIDIA card: {why}"]


def prepare_environment(deterministic: bool = False) -> list[str]:
    """Set the environment for jax. Returns notes to print.

    With `deterministic`, XLA uses no GPU program whose result differs in its bits from run to run, such as atomic
    additions, or kernels that are chosen by timing them.
    """
    notes: list[str] = []
    _check_address_space()
    if deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    if not os.environ.get("JAX_PLATFORMS") and runs_on_cpu():
        os.environ["JAX_PLATFORMS"] = "cpu"  # a plugin without a card prints a traceback at import
    if runs_on_cpu():
        keep_freed_memory()
    else:
        notes += _set_memory_fraction()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # its list of fonts, else in the home folder
    return notes


def _check_address_space() -> None:
    """Raise UserError if `ulimit -v` leaves too little: jax would abort, and no handler sees that."""
    with suppress(ImportError):  # Windows has none
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE:
            problem = f"ulimit -v {limit // 1024}: JAX needs at least {ADDRESS_SPACE // 1024} KiB of address space"
            raise UserError(f"{problem}; raise it, or use `ulimit -v unlimited`")


def _set_memory_fraction() -> list[str]:
    """Choose the share of a card's memory that JAX takes at start, unless the user has chosen one.

    By default JAX takes 75 % of a card's memory in one block, and a program gets no more than this block. On a small
    card without other programs, a fifth of the memory then stays unused. On a card that a display or another program
    uses, the block may not fit at all. So the share is computed from the memory that is free now, as nvidia-smi reports
    it.
    """
    if "microsoft" in platform.release().lower():  # WSL 2 gives no block of 4 GiB or more (openxla/xla, issue 48979)
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    # jax refuses both names of the share together.
    chosen = {SHARE, "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ)
    if chosen or os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == "false":
        return []
    try:
        total, free = map(float, ask_nvidia_smi("memory.total", "memory.free") or [])
    except ValueError:
        return []
    most = 0.9 if total <= SMALL_CARD_MIB else JAX_SHARE
    share = math.floor(100 * min(max((free - CUDA_MIB) / total, 0.1), most)) / 100
    if share == JAX_SHARE == most:
        return []
    os.environ[SHARE] = f"{share:.2f}"
    return [f"the card has {free:,.0f} of {total:,.0f} MiB free; JAX takes {share:.0%} ({SHARE} overrides)"]


def return_large_blocks() -> None:
    """For large models, after `keep_freed_memory`: give freed blocks of LARGE_BLOCK or more back to the kernel.

    The step of a large model takes one block of gigabytes. Where it stays in the heap, a small block may take a part of
    it. The next step then finds no block that is large enough, and the heap grows by as much again.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ and runs_on_cpu():
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(_MMAP_MAX, 1 << 16)
        libc.malloc_trim(0)  # what the heap holds free would be used first


def keep_freed_memory() -> None:
    """Set glibc's allocator so that it keeps freed memory. Nothing without glibc, or if GLIBC_TUNABLES sets it already.

    XLA's CPU client allocates the temporary buffers of a program at each call. By default glibc gets them from the
    kernel and returns them, so in every training step the kernel maps and zeroes all their pages again. All threads
    share one heap, because orbax starts new threads at each save. `benchmarks/performance.md` has the gains.

    The heap also gets huge pages. `mallopt` has no setting for them. So the heap grows once to half of the memory, the
    kernel is told to use huge pages there, and the block is freed again. Pages that nobody writes take no memory.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    # With one heap, two threads that learn a tokenizer take longer than one: they wait for each other.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never give the top of the heap back
    libc.mallopt(_MMAP_MAX, 0)  # take large blocks from the heap too
    libc.mallopt(_ARENA_MAX, 1)
    size = (machine_memory() or 0) // 2
    libc.malloc.restype = ctypes.c_void_p
    if block := libc.malloc(ctypes.c_size_t(size)):
        begin = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(max(block + size - begin, 0)), _HUGE_PAGES)
        libc.free(ctypes.c_void_p(block))
