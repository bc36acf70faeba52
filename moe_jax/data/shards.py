"""An array in several files: memory-mapped, and each file verified when it is read for the first time.

A stream of tokens lies in shards. A shard is one file, and the shards in order are the stream. A window may begin in
one shard and end in the next one. An index says which shards there are. It is checked before a file is opened.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from moe_jax.config import UserError

MOST_MAPS = 1024
"""Files that are mapped at a time. Linux allows a process 65,530 maps."""
_LONGEST = 1 << 48  # entries; an index that says more lies
_READ_BYTES = 1 << 22
_DIGEST = re.compile("[0-9a-f]{32}")


class Shard(NamedTuple):
    """A file of an array."""

    path: Path
    length: int
    """Entries."""
    digest: str
    """xxh3-128 of the file."""


class ShardedArray:
    """The shards of an array, one after the other. Indices give numpy arrays: a slice, or an array of integers or
    booleans. The first access to a shard reads all of it, to compare its digest."""

    def __init__(self, shards: Sequence[Shard], dtype: np.dtype) -> None:
        self.shards, self.dtype = tuple(shards), dtype
        self._ends = np.cumsum([shard.length for shard in shards], dtype=np.int64)
        self._verified = [False] * len(self.shards)
        self._map = lru_cache(MOST_MAPS)(self._new_map)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """Raises UserError for a damaged or missing shard, IndexError for an index that is out of range."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._range(start, stop) if step == 1 else self[np.arange(start, stop, step)]
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        flat = np.where(index < 0, index + len(self), index).reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"index {index.min()} to {index.max()}: the array has {len(self)} entries")
        found = self._gathered(flat).reshape(index.shape)
        return found if index.ndim else found[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)

    def verify(self, number: int) -> None:
        """Compare the digest of a shard, once. Raises UserError if it is damaged, missing or cannot be read.

        A damaged shard is removed, so that the next preparation makes it again.
        """
        if self._verified[number]:
            return
        path, length, expected = self.shards[number]
        try:
            found, size = digest_of(path), path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path}: missing; start again: only this shard is prepared again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from None
        if (found, size) != (expected, length * self.dtype.itemsize):
            raise UserError(
                f"{path}: damaged, its digest does not match; {_removed(path)} start again: only this shard is "
                "prepared again"
            )
        self._verified[number] = True

    def _range(self, start: int, stop: int) -> np.ndarray:
        """The entries [start, stop). No copy is made if they lie in one shard."""
        if stop <= start:
            return np.empty(0, self.dtype)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        found = []
        for number in range(first, last + 1):
            begin = int(self._ends[number]) - self.shards[number].length
            if self.shards[number].length:
                found.append(self._shard(number)[max(start - begin, 0) : stop - begin])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _gathered(self, index: np.ndarray) -> np.ndarray:
        """The entries at int [N]. Neighbours mostly lie in the same shard: each stretch is one access."""
        found = np.empty(len(index), self.dtype)
        numbers = np.searchsorted(self._ends, index, side="right")
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        for first, last in zip([0, *cuts], [*cuts, len(index)], strict=True):
            if first < last:
                number = int(numbers[first])
                begin = self._ends[number] - self.shards[number].length
                found[first:last] = self._shard(number)[index[first:last] - begin]
        return found

    def _shard(self, number: int) -> np.ndarray:
        self.verify(number)
        return self._map(number)

    def _new_map(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        return np.memmap(shard.path, dtype=self.dtype, mode="r", shape=(shard.length,))


def _removed(path: Path) -> str:
    """Remove a damaged file, so that the next preparation makes it again. Returns what to say of that."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return f"remove it ({error.strerror}: it could not be removed) and"
    return "it was removed;"


TokenArray = np.ndarray | ShardedArray
"""Token ids, uint16 or uint32 [N], or a mask of them, bool [N]."""


def digest_of(path: Path, also: Any = None) -> str:
    """xxh3-128 of a file. `also` is a digest that gets the same bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            if also is not None:
                also.update(chunk)
    return digest.hexdigest()


def shard_name(split: str, number: int, ending: str) -> str:
    return f"{split}.{number:05d}.{ending}"


def indexed(folder: Path, split: str, entry: dict[str, Any], dtype: np.dtype, mask: bool = False) -> ShardedArray:
    """The tokens of a split, or the mask of them, by the split's entry in an index (`token_store.py`).

    Raises UserError as `check_index` does, and if a file is missing or has another size.
    """
    check_index(folder, split, entry)
    ending, entries = "mask" if mask else "bin", entry.get("shards")
    names = [shard_name(split, i, ending) for i in range(len(entries))] if entries else [f"{split}.{ending}"]
    shards = [
        Shard(folder / name, one["tokens"], one["answers"]["digest"] if mask else one["digest"])
        for name, one in zip(names, entries or [entry], strict=True)
    ]
    for path, length, _ in shards:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path}: missing; prepare the data again") from None
        if size != length * dtype.itemsize:
            raise UserError(f"{path}: has {size:,} bytes, not those of {length:,} entries; prepare the data again")
    return ShardedArray(shards, dtype)


def check_index(folder: Path, split: str, entry: Any) -> None:
    """Raise UserError if the entry of a split has a value that cannot be, or is not the sum over its shards.

    A split with one shard has no list of shards, and its file has no number.
    """
    _check_entry(folder, split, entry)
    if "shards" not in entry:
        return
    entries = entry["shards"]
    if not isinstance(entries, list) or not entries:
        raise _wrong(folder, f"shards of {split}", entries, "a list")
    for number, one in enumerate(entries):
        _check_entry(folder, f"{split}, shard {number}", one)
        if ("answers" in one) != ("answers" in entry):
            raise _wrong(
                folder, f"answers of {split}, shard {number}", one.get("answers"), "there for all shards or none"
            )
    for key in ("tokens", "stories", "bytes"):
        if entry[key] != (total := sum(one[key] for one in entries)):
            raise _wrong(folder, f"{key} of {split}", entry[key], f"{total}, the sum over its shards")


def _check_entry(folder: Path, what: str, entry: Any) -> None:
    """Raise UserError if an entry of an index has a value that cannot be."""
    if not isinstance(entry, dict):
        raise _wrong(folder, what, entry, "an object")
    counts = [(key, entry.get(key)) for key in ("tokens", "stories", "bytes")]
    digests = [entry.get("digest")]
    if "answers" in entry:
        answers = entry["answers"]
        if not isinstance(answers, dict):
            raise _wrong(folder, f"answers of {what}", answers, "an object")
        counts += [(f"answers.{key}", answers.get(key)) for key in ("tokens", "bytes")]
        digests.append(answers.get("digest"))
    for key, value in counts:
        if type(value) is not int or not 0 <= value <= _LONGEST:
            raise _wrong(folder, f"{key} of {what}", value, f"a number from 0 to {_LONGEST}")
    for digest in digests:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _wrong(folder, f"digest of {what}", digest, "32 hexadecimal digits")


def _wrong(folder: Path, what: str, value: Any, allowed: str) -> UserError:
    return UserError(
        f"{folder / 'manifest.json'}: {what} is {str(value)[:40]}, must be {allowed}; prepare the data again"
    )
