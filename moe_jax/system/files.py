"""Atomic writes, output of commands, file locks that the system releases when their process ends, and the folder of
the caches.

Standard library only, so that every module may use it.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_jax.system.folders import Folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def cache_dir() -> Path:
    """Where prepared data and compiled programs are kept: MOE_JAX_CACHE, else the user's cache folder."""
    given = os.environ.get("MOE_JAX_CACHE")
    if given:
        return Path(given)
    import platformdirs

    return platformdirs.user_cache_path("moe-jax")


def disk_cause(error: Exception) -> str | None:
    """The cause of an error of the file system, or None for another error. For tensorstore and safetensors, it is found
    in the text of the error."""
    for cause, numbers in _CAUSES.items():
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in numbers:
                return cause
        elif any(os.strerror(number) in str(error) for number in numbers):
            return cause
    return (error.strerror or str(error)) if isinstance(error, OSError) else None


_CAUSES = {
    "the disk is full": (errno.ENOSPC, errno.EDQUOT),
    "a file is larger than `ulimit -f` allows": (errno.EFBIG,),
}


def write_atomically(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Replace a plain file by a rename: see `Folder.write`. Raises UnsafeFile if something else has the name."""
    Folder(path.parent).write(path.name, content, durable)


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that the user has named. Makes the folders above it.

    A plain file is replaced by a rename. A rename would also replace a device, a pipe or a link by a file. So these are
    written through, as a shell does it. Raises OSError if nobody reads from a pipe, and for block devices and sockets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISREG(mode):
        write_atomically(path, content)
        return
    try:
        if stat.S_ISBLK(path.stat().st_mode):
            raise OSError(errno.EINVAL, "is a disk; name a file", str(path))
    except FileNotFoundError:
        pass  # a link to a file that is not there yet
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
        os.set_blocking(descriptor, True)  # only the opening may not wait: a pipe without a reader never opens
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EPIPE):
            raise OSError(errno.EIO, "nobody reads from it; start its reader, or name a file", str(path)) from None
        error.filename = str(path)
        raise


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[BinaryIO | None]:
    """Hold the lock of a file. Creates the file if it is missing. The system releases the lock when the process ends.

    Yields the open file, so that the holder can write its process id into it. Yields None if the operating system or
    the file system has no locks; then no process is kept out. Raises BlockingIOError if another process holds the lock
    and `wait` is false, and UnsafeFile if a link or no plain file has the name.
    """
    with Folder(path.parent).lock_file(path.name) as file:
        held = fcntl is not None
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:  # some network file systems
                held = False
        yield file if held else None
