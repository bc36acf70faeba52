"""A compilation cache for jax on disk, whose entries are written atomically and verified when they are read.

jax writes an entry of its own persistent cache in place. A process that is killed during the write leaves a truncated
entry. Every later run reads this entry, rejects it and compiles again. It never replaces the entry, because a file with
that name exists. Here a file begins with the digest of its entry. The file gets its name once it is complete. A file
whose digest does not match is removed.
"""

import contextlib
import hashlib
import time
from pathlib import Path

from jax._src import compilation_cache  # there is no public way to give jax a cache
from jax._src.compilation_cache_interface import CacheInterface

from moe_jax.system.files import write_atomically

_DIGEST = 32
_FORGOTTEN = 3600.0
"""Age of a draft, in seconds, after which it is removed: the process that wrote it must have died."""


class VerifiedCache(CacheInterface):
    """One file an entry: SHA-256 of key and value, then the value.

    Earlier versions left the key out. Their entries count as damaged, and the programs are compiled once more.
    """

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
        """The value, or None if the entry is missing or damaged. A damaged entry is removed."""
        try:
            content = self._file(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, value = content[:_DIGEST], content[_DIGEST:]
        if _digest(key, value) == digest:
            return value
        with contextlib.suppress(OSError):  # in a folder that cannot be written, the entry stays
            self._file(key).unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Store a value. If two processes compile the same program, the later one replaces the file of the earlier."""
        # If the write fails, jax warns and continues without the entry.
        write_atomically(self._file(key), _digest(key, value) + value, durable=False)


def _digest(key: str, value: bytes) -> bytes:
    """SHA-256 of an entry with its key: so a program that has another program's name is not taken for it."""
    return hashlib.sha256(len(key).to_bytes(8) + key.encode() + value).digest()


def install() -> None:
    """Make jax use this cache. Call it before the first program is compiled."""
    compilation_cache.get_file_cache = lambda path: (VerifiedCache(path), path)
