"""Files and folders: the caches, atomic writes, plain files below a folder, locks, JSON, and the names of steps.

A run's folder may come from somebody else. A link in it could lead a write, a delete or a read to any other file, and a
pipe or a device would stop the program. So `Folder` uses plain files below it only.

Standard library only, apart from `platformdirs`, `filelock` and `xxhash`, which are imported when they are needed.
"""

import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe_jax.system.signals import unwinding

MAX_JSON_BYTES = 2**26
"""Largest JSON document that is read. The largest that a run has is a tokenizer, of a few MiB."""
_KINDS = {
    stat.S_IFLNK: "is a link, and links are not followed here; put the file or folder itself there",
    stat.S_IFDIR: "is a folder where a file belongs; remove it",
    stat.S_IFREG: "is a file where a folder belongs; remove it",
}
_STEP = re.compile(r"step_(\d{8,18})", re.ASCII)


def cache_dir() -> Path:
    """Where prepared data and compiled programs are kept: MOE_JAX_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MOE_JAX_CACHE")
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("moe-jax")


class UnsafeFile(OSError):
    """A link, or something else than the plain file or the folder that belongs there; or a file of absurd size."""


@dataclass(frozen=True)
class Folder:
    """A folder, and what is done with the files below it.

    A name below it, such as `traces/step_00000100.json`, has "/" between its parts. The folder itself may be reached
    through a link. A link, a pipe or a device in the name raises UnsafeFile.
    """

    path: Path
    writes: bool = True
    """False: another process writes the folder, and every change is left to that process."""

    def file(self, name: str) -> Path:
        """The path of a plain file, or of nothing."""
        return self._checked(name, stat.S_ISREG)

    def folder(self, name: str) -> Path:
        """The path of a folder, or of nothing."""
        return self._checked(name, stat.S_ISDIR)

    def _checked(self, name: str, allowed: Any) -> Path:
        *parts, last = name.split("/")
        path = self.path
        for part, is_allowed in [*((part, stat.S_ISDIR) for part in parts), (last, allowed)]:
            if part in ("", ".", ".."):
                raise UnsafeFile(errno.EINVAL, "is outside of its folder", name)
            path = path / part
            with suppress(FileNotFoundError, NotADirectoryError):
                mode = path.lstat().st_mode
                if not is_allowed(mode):
                    problem = _KINDS.get(stat.S_IFMT(mode), "is no plain file; remove it")
                    raise UnsafeFile(errno.EINVAL, problem, str(path))
        return path

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name, be it a link. Raises OSError if the system does not say."""
        try:
            (self.folder(name.rpartition("/")[0]) if "/" in name else self.path).joinpath(Path(name).name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self, name: str) -> list[str]:
        """The sorted names in a folder below this one. Empty if there is none."""
        try:
            return sorted(os.listdir(self.folder(name)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, name: str, limit: int | None = None) -> BinaryIO:
        """A plain file, for reading. Raises UnsafeFile if it has more than `limit` bytes."""
        path = self.file(name)
        size = path.stat().st_size
        if limit is not None and size > limit:
            problem = f"has {size:,} bytes, and at most {limit:,} are read; put the right file there"
            raise UnsafeFile(errno.EFBIG, problem, str(path))
        return path.open("rb")

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """The content of a plain file of at most `limit` bytes."""
        with self.open(name, limit) as file:
            return file.read()

    def read_json(self, name: str) -> Any:
        """The value in a JSON file: see `parse_json`."""
        return parse_json(self.read(name))

    def open_end(self, name: str) -> BinaryIO:
        """A plain file, for writing at its end. Made if it is missing."""
        return self.file(name).open("ab") if self.writes else open(os.devnull, "ab")

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a plain file by a rename: see `write_atomically`."""
        if self.writes:
            write_atomically(self.file(name), content)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything in it, if it is there. A link is removed itself."""
        if not self.writes:
            return
        path = self.folder(name.rpartition("/")[0]) / Path(name).name if "/" in name else self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def make(self, name: str) -> Path:
        """Make a folder unless it is there. Returns its path."""
        path = self.folder(name)
        if self.writes:
            path.mkdir(exist_ok=True)
        return path

    def inner(self, name: str) -> "Folder":
        """A folder below this one, made unless it is there."""
        return Folder(self.make(name), self.writes)


def draft_of(path: Path) -> Path:
    """A new temporary name, under which a file is written before it is renamed to `path`. No two calls give the same.

    A process id is not enough: threads share it, and containers that share a folder each have a process 1.
    """
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.draft")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a plain file by a rename: a reader sees the old content or the new one, never a part, after a power loss
    too. An error or an interrupt leaves no draft behind. Raises UnsafeFile if something else has the name."""
    with _replaced(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """The new content of a plain file: see `write_atomically`."""
    Folder(path.parent).file(path.name)
    draft = draft_of(path)
    with unwinding():
        try:
            with draft.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError):  # the user knows the file, not its draft
                error.filename, error.filename2 = str(path), None
            raise


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes the folder `out` if all goes well; `out` must be missing or empty. So `out` is
    whole or absent. What a killed process left beside it is removed by the next one for the same name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for killed in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):  # a living process holds the lock of its own
        with suppress(OSError), locked(killed / "lock", wait=False):
            shutil.rmtree(killed)
    partial = out.parent / f".{out.name}.{secrets.token_hex(8)}.partial"
    try:
        partial.mkdir()
        with locked(partial / "lock", wait=False):
            draft = partial / out.name
            draft.mkdir()
            yield draft
            if out.exists():
                out.rmdir()
            draft.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that the user has named: see `open_output`."""
    with open_output(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """A file that the user has named, for writing. Makes the folders above it.

    A plain file is replaced by a rename at the end, and stays as it was after an error. A rename would also replace a
    device, a pipe or a link by a file. So these are written through, as a shell does it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    through = path.exists() and (path.is_symlink() or not path.is_file())
    with path.open("wb") if through else _replaced(path) as file:
        yield file


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of a file. Creates the file if it is missing. The system releases the lock when the process ends.

    Raises BlockingIOError if another process holds the lock and `wait` is false.
    """
    import filelock

    lock = filelock.FileLock(Folder(path.parent).file(path.name))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from None
    try:
        yield
    finally:
        lock.release()


def cached_json(folder: str, parts: Sequence[str], make: Callable[[], Any]) -> Any:
    """What `make` returns; or what it returned in an earlier process for the same `parts`. A value that JSON can hold.

    `parts` name all that the value depends on. They decide the name of a file in a folder of the user's cache. A file
    that cannot be read is made again, and one that cannot be written is made each time.
    """
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest() + ".json"
    path = cache_dir() / folder / name
    with suppress(OSError, ValueError):
        return Folder(path.parent).read_json(name)
    made = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(made))
    return made


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's content."""
    import xxhash

    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # pyright: ignore[reportArgumentType]


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps(value, **options)`, with null in place of every number that is not finite: JSON has no NaN."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: bytes) -> Any:
    """The value of a JSON text. NaN and Infinity, which are no JSON, become None: as such this program writes them.

    Raises ValueError if the text is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def step_name(step: int) -> str:
    """The name of a step's files and folders: `step_00000100`.

    A step has eight digits, or more if eight are not enough. So names do not sort as their steps do: compare numbers.
    """
    return f"step_{step:08d}"


def step_number(name: str) -> int | None:
    """The step that a name stands for; None for a name that `step_name` does not write."""
    match = _STEP.fullmatch(name)
    step = int(match[1]) if match else -1
    return step if step_name(step) == name else None
