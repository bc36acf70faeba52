"""Compiled programs on disk, each published by a rename and checked when it is read.

jax writes an entry of its persistent cache in place. A process that is killed meanwhile leaves a truncated one, which
every later run reads, rejects, compiles again, and does not replace, since it exists. Here an entry begins with its
digest, appears under its name when it is whole, and is removed where it does not match.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from jax._src import compilation_cache  # there is no public way to give jax a cache
from jax._src.compilation_cache_interface import CacheInterface

_DIGEST = 32
_FORGOTTEN = 3600.0
"""Seconds after which a draft is of a process that died."""


class VerifiedCache(CacheInterface):
    """One file an entry: SHA-256 of the value, then the value."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        for draft in self._path.glob("*.draft"):
            with contextlib.suppress(OSError):
                if time.time() - draft.stat().st_mtime > _FORGOTTEN:
                    draft.unlink()

    def _file(self, key: str) -> Path:
        return self._path / f"{key}.program"

    def get(self, key: str) -> bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride], an abstract None
        """The value, or None where there is none or it was damaged; a damaged one is removed."""
        try:
            content = self._file(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, value = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(value).digest() == digest:
            return value
        self._file(key).unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a value; of two processes that compiled the same program the later one replaces an equal file."""
        draft = self._path / f"{key}.{os.getpid()}.draft"
        try:
            draft.write_bytes(hashlib.sha256(value).digest() + value)
            draft.replace(self._file(key))
        except OSError:
            draft.unlink(missing_ok=True)
            raise  # jax warns and goes on without


def install() -> None:
    """Make jax keep its programs so. Call it before the first program is compiled."""
    compilation_cache.get_file_cache = lambda path: (VerifiedCache(path), path)
