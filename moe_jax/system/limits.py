"""The limits of this process: memory, address space, open files. Standard library only: they are checked before jax."""

import os
from contextlib import suppress
from pathlib import Path

from moe_jax.system.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

GIB, MIB = 2**30, 2**20
LEAST_ADDRESS_SPACE = 2 * GIB
"""Address space for jax, its compiler and the smallest run. With 1.5 GiB, LLVM aborts the process without a word."""
LEAST_FILES, USUAL_FILES = 64, 1024
"""Open files: a run with a checkpoint needs more than 24. A process may raise its own limit up to the hard limit."""
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def address_space() -> int | None:
    """Bytes of address space that this process may have (`ulimit -v`). None without a limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


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


def check_limits() -> None:
    """Raise UserError if jax cannot run within the limits of this process. Raises the limit of open files if it can."""
    space = address_space()
    if space is not None and space < LEAST_ADDRESS_SPACE:
        raise UserError(
            f"ulimit -v {space // 1024}: {space / GIB:.1f} GiB of address space are too little for JAX, which needs "
            f"{LEAST_ADDRESS_SPACE / GIB:.0f} GiB; raise the limit"
        )
    if resource is None:
        return
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < USUAL_FILES and files != resource.RLIM_INFINITY:
        most = USUAL_FILES if hard == resource.RLIM_INFINITY else min(hard, USUAL_FILES)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files < LEAST_FILES:
            raise UserError(f"ulimit -n {files}: too few open files, {LEAST_FILES} are needed; raise the limit")
