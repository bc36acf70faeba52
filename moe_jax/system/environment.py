"""Settings that must be made before jax is imported: the platform, the allocator, the compilation cache.

Every program calls `prepare` once its arguments are accepted. Until `prepare` has set the environment, only the
standard library is imported.
"""

import importlib.util
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

from moe_jax.system.files import cache_dir
from moe_jax.system.limits import check_limits

SMALL_CARD_MIB = 8500
"""A card with at most this memory is small. On a larger card, JAX's default share of 75 % leaves enough for JAX and for
other programs."""
CUDA_MIB = 400
"""MiB that are kept free for memory outside JAX's block: the CUDA context, loaded kernels, handles and workspaces."""

_TUNABLES = ":".join(
    f"glibc.malloc.{name}" for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=100000000000", "arena_max=1")
)

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def has_nvidia_card() -> bool:
    """Whether a driver has made an NVIDIA card visible."""
    return any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version"))


def has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))


def runs_on_cpu() -> bool:
    """Whether jax computes, or will compute, on the CPU: as JAX_PLATFORMS says, else where there is no usable card."""
    # JAX takes an empty variable for one that is not set.
    return (os.environ.get("JAX_PLATFORMS") or ("" if has_nvidia_card() and has_cuda_plugin() else "cpu")) == "cpu"


def unused_card(platform: str) -> list[str]:
    """A note if jax computes on the CPU although this machine seems to have an NVIDIA card. Empty otherwise.

    `platform` is that of jax's first device. A restart of the program has set JAX_PLATFORMS, so the variable alone does
    not say why the card is left out.
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


def silence_libraries() -> None:
    """Keep XLA's warnings off stderr, unless the user has asked for them: every start of several processes has one."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def prepare_environment(deterministic: bool = False) -> list[str]:
    """Set the environment for jax. Returns notes to print. May restart the program, on a CPU.

    With `deterministic`, XLA uses no GPU program whose result differs in its bits from run to run, such as atomic
    additions, or kernels that are chosen by timing them.
    """
    check_limits()
    notes: list[str] = []
    if deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    if not os.environ.get("JAX_PLATFORMS") and runs_on_cpu():
        os.environ["JAX_PLATFORMS"] = "cpu"  # a plugin without a card prints a traceback at import
    if runs_on_cpu():
        notes += restart_with_malloc_settings()
    else:
        notes += _set_memory_fraction()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # its list of fonts, else in the home folder
    from moe_jax.system import compile_cache  # imports jax: from here on the environment is read

    compile_cache.install()
    return notes


def _set_memory_fraction() -> list[str]:
    """Choose the share of a small card's memory that JAX takes at start, unless the user has chosen one.

    By default JAX takes 75 % of a card's memory in one block, and a program gets no more than this block. On a small
    card without other programs, a fifth of the memory then stays unused. On a small card that drives a display, the
    block may not fit at all. So the share is computed from the memory that is free now, as nvidia-smi reports it.
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
    """Share of a card's memory for JAX: (free - CUDA_MIB) / total, within [0.10, 0.90], rounded down to hundredths."""
    return math.floor(100 * min(max((free - CUDA_MIB) / total, 0.1), 0.9)) / 100


def restart_with_malloc_settings() -> list[str]:
    """Restart the program with glibc settings under which the allocator keeps freed memory. Only where there is glibc.

    XLA's CPU client allocates the temporary buffers of a program at each call. By default glibc gets them from the
    kernel and returns them, so in every training step the kernel maps and zeroes all their pages again: a third of the
    time of a step of preset nano. All threads share one heap (`arena_max=1`), because orbax starts new threads at each
    save. With a heap for each thread, nano held 110 MB more, the amount grew with every save, and a step was 8 %
    slower. glibc reads these settings only when a process starts, so the process replaces itself (execv), with the same
    process id. MOE_JAX_RESTART=0 refuses that. A program that a debugger, a profiler or a launcher has started is left
    alone, because the restart would lose it. Returns a note for a program that goes on without the settings.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return []
    if os.environ.get("MOE_JAX_RESTART") == "0" or is_traced() or not is_plain_start(sys.orig_argv):
        return [f"without a restart for glibc's allocator, steps may be slower; GLIBC_TUNABLES={_TUNABLES} sets it"]
    os.environ["GLIBC_TUNABLES"] = _TUNABLES
    # With one heap, two threads that learn a tokenizer take longer than one: they wait for each other.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    raise AssertionError("a process that has replaced itself does not go on")


def is_traced() -> bool:
    """Whether a debugger, a profiler or a measurement of coverage watches this process."""
    tools = any(sys.monitoring.get_tool(number) is not None for number in range(6))
    return tools or sys.gettrace() is not None or sys.getprofile() is not None


PROGRAMS = {"train.py", "benchmark.py", "moe-jax", "moe_jax"}
"""The programs that may restart themselves: scripts by their name, and the package by `-m`."""


def is_plain_start(command: list[str]) -> bool:
    """Whether a command line is Python, options of Python, and then one of our programs.

    Not plain are `python -m pdb train.py`, `coverage run train.py` and `python launcher.py train.py`.
    """
    words = iter(command[1:])
    for word in words:
        if word == "-m":
            return next(words, "") in PROGRAMS
        if word in ("-X", "-W"):
            next(words, "")
        elif word.startswith("-c") or word in ("-", "-i"):
            return False
        elif not word.startswith("-"):
            return Path(word).name in PROGRAMS
    return False
