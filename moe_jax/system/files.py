"""Atomic writes, file locks that the system releases when their process ends, and the folder of the caches.

Standard library only, so that every module may use it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

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


def draft_of(path: Path) -> Path:
    """The temporary name under which this process writes a file, before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.draft")


def write_atomically(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Replace a file by a rename: a reader sees the old content or the new one, never a part.

    With `durable` this holds after a power loss too. An error or an interrupt leaves no draft behind.
    """
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[TextIO | None]:
    """Hold the lock of a file. Creates the file if it is missing. The system releases the lock when the process ends.

    Yields the open file, so that the holder can write its process id into it. Yields None if the operating system or
    the file system has no locks; then no process is kept out. Raises BlockingIOError if another process holds the lock
    and `wait` is false.
    """
    with path.open("a+", encoding="utf-8") as file:
        held = fcntl is not None
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:  # some network file systems
                held = False
        yield file if held else None
