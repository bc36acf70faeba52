"""Files below a folder, reached without following a link.

A run's folder may come from somebody else, or hold links that the user forgot. A link in it could lead a write, a
delete or a read to any other file. So every function here takes a folder and a name below it, such as
`traces/step_00000100.json`. The folder itself may be reached through a link. No part of the name may be a link, and a
file must be a plain one: a pipe or a device would stop the program, or never end.

Where the system has no directory descriptors (Windows), each part is looked at before it is opened by its path.

Standard library only.
"""

import errno
import json
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

_BY_DESCRIPTOR = {os.open, os.stat, os.unlink, os.rename, os.mkdir} <= os.supports_dir_fd
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_OPEN = _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_OPEN_FOLDER = os.O_RDONLY | _NO_LINK | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
MAX_JSON_BYTES = 2**26
"""Largest JSON document that is read. The largest that a run has is a tokenizer, of a few MiB."""
writing = threading.Lock()
"""Held while a draft is there: a thread that ends the process takes it first, and so leaves no draft behind."""
_KINDS = {
    stat.S_IFLNK: "is a link, and links are not followed here; put the file or folder itself there",
    stat.S_IFDIR: "is a folder where a file belongs; remove it",
    stat.S_IFREG: "is a file where a folder belongs; remove it",
}


class UnsafeFile(OSError):
    """A link, or something else than the plain file or the folder that belongs there; or a file of absurd size."""


def _refuse(path: Path, mode: int) -> NoReturn:
    problem = _KINDS.get(stat.S_IFMT(mode), "is no plain file; remove it")
    raise UnsafeFile(errno.EINVAL, problem, str(path))


def unguarded() -> None:
    """The guard of a folder that needs none."""


@dataclass(frozen=True)
class Folder:
    """A folder, and what is done with the files below it.

    `guard` is called before anything is changed. It raises if this process may not change the folder any more.
    """

    path: Path
    guard: Callable[[], None] = unguarded

    def status(self, name: str) -> os.stat_result | None:
        """The status of a file or folder, of a link itself; None where there is nothing."""
        try:
            with self._above(name) as (parent, last):
                return os.stat(last, dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, name: str) -> list[str]:
        """The sorted names in a folder below this one. Empty if there is none. Raises UnsafeFile for a link or a
        file."""
        try:
            with self._above(f"{name}/.") as (inner, path):
                return sorted(os.listdir(os.path.dirname(path) if inner is None else inner))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """The content of a plain file. Raises UnsafeFile for anything else, and for more than `limit` bytes."""
        with self.open(name, limit) as file:
            # One byte more than there is: asked for more, Python would reserve memory for all of it.
            content = file.read(os.fstat(file.fileno()).st_size + 1)
            if len(content) > limit:
                self._too_long(name, len(content), limit)
            return content

    def read_json(self, name: str, limit: int = MAX_JSON_BYTES) -> Any:
        """The value in a JSON file: see `parse_json`."""
        return parse_json(self.read(name, limit))

    def open(self, name: str, limit: int | None = None) -> BinaryIO:
        """A plain file, for reading. Raises UnsafeFile if it has more than `limit` bytes."""
        file = os.fdopen(self._descriptor(name, os.O_RDONLY), "rb")
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            file.close()
            self._too_long(name, size, limit)
        return file

    def _too_long(self, name: str, size: int, limit: int) -> NoReturn:
        problem = f"has {size:,} bytes, and at most {limit:,} are read; put the right file there"
        raise UnsafeFile(errno.EFBIG, problem, str(self.path / name))

    def append(self, name: str) -> BinaryIO:
        """A plain file, for writing at its end. Made if it is missing."""
        self.guard()
        return os.fdopen(self._descriptor(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")

    def lock_file(self, name: str) -> BinaryIO:
        """A plain file, for reading and writing at its end. Made if it is missing."""
        return os.fdopen(self._descriptor(name, os.O_RDWR | os.O_APPEND | os.O_CREAT), "ab+")

    def write(self, name: str, content: str | bytes, durable: bool = True) -> None:
        """Replace a plain file by a rename: a reader sees the old content or the new one, never a part.

        With `durable` this holds after a power loss too. An error or an interrupt leaves no draft behind.
        """
        self.guard()
        data = content.encode() if isinstance(content, str) else content
        with writing, self._above(name) as (parent, last):
            with suppress(FileNotFoundError):
                mode = os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode
                if not stat.S_ISREG(mode):
                    _refuse(self.path / name, mode)
            draft = str(draft_of(Path(last)))
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o666, dir_fd=parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
                os.replace(draft, last, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with suppress(OSError):
                    os.unlink(draft, dir_fd=parent)
                raise

    def remove(self, name: str) -> None:
        """Remove a file if it is there. Of a link, the link itself."""
        self.guard()
        with suppress(FileNotFoundError), self._above(name) as (parent, last):
            os.unlink(last, dir_fd=parent)

    def make(self, name: str) -> Path:
        """Make a folder unless it is there. Returns its path. Raises UnsafeFile if a link or a file is there."""
        self.guard()
        with self._above(name) as (parent, last):
            try:
                os.mkdir(last, dir_fd=parent)
            except FileExistsError:
                mode = os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode
                if not stat.S_ISDIR(mode):
                    _refuse(self.path / name, mode)
        return self.path / name

    def inner(self, name: str) -> "Folder":
        """A folder below this one, made unless it is there."""
        return Folder(self.make(name), self.guard)

    def remove_tree(self, name: str) -> None:
        """Remove a folder with everything in it. Of a link, the link itself."""
        self.guard()
        with self._above(name) as (parent, last):
            if stat.S_ISDIR(os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode):
                shutil.rmtree(last, dir_fd=parent)
            else:
                os.unlink(last, dir_fd=parent)

    def rename(self, old: str, new: str) -> Path:
        """Rename a file or folder within the folder that holds it. `new` is its new last name. Returns the new path."""
        self.guard()
        with self._above(old) as (parent, last):
            target = new if parent is not None else os.path.join(os.path.dirname(last), new)
            os.rename(last, target, src_dir_fd=parent, dst_dir_fd=parent)
        return (self.path / old).with_name(new)

    def _descriptor(self, name: str, flags: int) -> int:
        with self._above(name) as (parent, last):
            with suppress(FileNotFoundError):  # before it is opened: opening a device may have an effect of its own
                mode = os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode
                if not stat.S_ISREG(mode):
                    _refuse(self.path / name, mode)
            descriptor = os.open(last, flags | _OPEN, 0o666, dir_fd=parent)
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                os.close(descriptor)
                _refuse(self.path / name, mode)
            return descriptor

    @contextmanager
    def _above(self, name: str) -> Iterator[tuple[int | None, str]]:
        """The folder that holds `name`, as a descriptor, and the last part of the name.

        Without directory descriptors: None, and the path. An OSError from within gets the whole path as its file name.
        """
        *parts, last = name.split("/")
        opened: list[int] = []
        path = self.path
        try:
            if _BY_DESCRIPTOR:
                opened.append(os.open(path, _OPEN_FOLDER & ~_NO_LINK))
            for part in parts:
                above, path = (opened[-1] if opened else None), path / part
                mode = os.stat(part if opened else path, dir_fd=above, follow_symlinks=False).st_mode
                if not stat.S_ISDIR(mode):
                    _refuse(path, mode)
                if opened:
                    opened.append(os.open(part, _OPEN_FOLDER, dir_fd=above))
            yield (opened[-1], last) if opened else (None, str(path / last))
        except UnsafeFile:
            raise
        except OSError as error:
            error.filename = str(self.path / name)
            error.filename2 = None
            raise
        finally:
            for descriptor in opened:
                os.close(descriptor)


class Unwritten(Folder):
    """A folder that another process writes. It is read as any folder, and every change is left to that process."""

    def append(self, name: str) -> BinaryIO:
        return open(os.devnull, "ab")

    def write(self, name: str, content: str | bytes, durable: bool = True) -> None: ...

    def remove(self, name: str) -> None: ...

    def make(self, name: str) -> Path:
        return self.path / name

    def inner(self, name: str) -> "Folder":
        return Unwritten(self.path / name)

    def remove_tree(self, name: str) -> None: ...

    def rename(self, old: str, new: str) -> Path:
        return (self.path / old).with_name(new)


def parse_json(text: bytes) -> Any:
    """The value of a JSON text. NaN and Infinity, which are no JSON, become None: as such this program writes them.

    Raises ValueError if the text is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def draft_of(path: Path) -> Path:
    """A new temporary name, under which a file is written before it is renamed to `path`. No two calls give the same.

    A process id is not enough: threads share it, and containers that share a folder each have a process 1.
    """
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.draft")
