"""Files: the caches, atomic writes, locks, JSON, and the names of steps.

Standard library only, apart from `platformdirs`, `filelock` and `xxhash`, which are imported when they are needed.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from moe_jax.system.errors import UserError, disk_cause

_STEP = re.compile(r"step_(\d{8,18})", re.ASCII)


def cache_dir() -> Path:
    """Where prepared data and compiled programs are kept: MOE_JAX_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MOE_JAX_CACHE")
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("moe-jax")


# Writing


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by a rename: a reader sees the old content or the new one, never a part, after a power loss too.

    Raises OSError with the name of the file. The old content stays then.
    """
    with _replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that the user has named: see `open_output`."""
    with open_output(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """A file that the user has named, for writing. Makes the folders above it.

    A file is replaced at the end, and stays as it was after an error. A device or a pipe is written through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") if path.exists() and not path.is_file() else _replacing(path) as file:
        yield file


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """The new content of a file: see `write_atomically`."""
    draft = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.draft")
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
    whole or absent. What a killed process has left beside it is removed by the next one for the same name."""
    draft = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def out_folder(out: Path, done: str) -> Iterator[Path]:
    """`new_folder` for the flag --out of a command. Raises UserError if it cannot be written: it says what the disk
    said, and that nothing was `done`, such as "exported"."""
    try:
        with new_folder(out) as draft:
            yield draft
    except Exception as error:
        cause = disk_cause(error) or (isinstance(error.__cause__, Exception) and disk_cause(error.__cause__))
        if not cause:
            raise
        raise UserError(f"--out {out}: cannot be written ({cause}); nothing was {done}") from None


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of a file. Creates the file if it is missing. The system releases the lock when the process ends.

    Raises BlockingIOError if another process holds the lock and `wait` is false.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from None
    try:
        yield
    finally:
        lock.release()


# JSON


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


def read_json(path: Path) -> Any:
    """The value in a JSON file: see `parse_json`. Raises OSError if the file cannot be read."""
    return parse_json(path.read_bytes())


def cached_json(folder: str, parts: Sequence[str], make: Callable[[], Any]) -> Any:
    """What `make` returns; or what it returned in an earlier process for the same `parts`. A value that JSON can hold.

    `parts` name all that the value depends on. They decide the name of a file in a folder of the user's cache. A file
    that cannot be read is made again, and one that cannot be written is made each time.
    """
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest() + ".json"
    path = cache_dir() / folder / name
    with suppress(OSError, ValueError):
        return read_json(path)
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


# Names of steps


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


def steps_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> the path in a folder that has its name and the suffix, in order. Empty if there is no such folder.

    Raises OSError if the folder cannot be read.
    """
    try:
        paths = [path for path in folder.iterdir() if path.name.endswith(suffix)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    steps = {step_number(path.name.removesuffix(suffix)): path for path in paths}
    return {step: steps[step] for step in sorted(step for step in steps if step is not None)}
