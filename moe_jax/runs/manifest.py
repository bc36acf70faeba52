"""The manifest of a checkpoint: sizes and digests of its files, and shapes, dtypes and digests of its arrays.

    {"version": 3, "step": ..., "files": {"arrays/d/...": [bytes, xxh3-128], ...},
     "leaves": {"params.embedding": [[1024, 128], "float32", xxh3-128], ...}, "state": ..., "digest": ...}

Orbax itself does not notice a flipped bit: it returns a wrong weight. The digests of the files find such damage before
anything is restored. The digests of the leaves (arrays) are computed from the arrays in memory, so they also check what
orbax wrote and read. `state` is one digest of all leaves: equal digests mean equal bits. The last key, `digest`, is
computed from the text before it, so a change anywhere in the manifest is noticed.

A checkpoint may come from an untrusted source. Sizes are checked before a file is read, links are not followed, and
nothing is unpickled.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe_jax.config import UserError
from moe_jax.parallel.processes import is_here, whole
from moe_jax.system.files import Folder, UnsafeFile, file_digest, step_number

NAME = "manifest.json"
VERSION = 3
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_ARRAY_BYTES = 2**40
_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_DTYPES = frozenset(["bool", *_INTEGERS, "bfloat16", "float16", "float32", "float64"])


class CheckpointCorrupted(UserError):
    """A damaged checkpoint: what was read is wrong, or is not there. The text names the damage in a few words.

    If the system refuses to read a file, that is no damage, and the OSError is raised: the checkpoint may well be
    whole, so it is never passed over for an older one, renamed or removed.
    """


@dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    digest: str


def array_digest(array: Any) -> str:
    """xxh3-128 of an array's bytes in C order. (SHA-256 would take half the time of a whole save, as measured.)"""
    values = np.ascontiguousarray(np.asarray(array))
    return xxhash.xxh3_128(values.reshape(-1).view(np.uint8).data).hexdigest()


def _digests[T](digest: Callable[[T], str], things: Iterable[T]) -> list[str]:
    """The digest of each item, in order. Reading and xxh3 release Python's GIL, so a second core halves the time."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, things))


def describe_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's keys `leaves` and `state`."""
    entries = sorted(leaves.items())
    if all(is_here(x) for _, x in entries):
        digests = _digests(lambda x: array_digest(whole(x)), (x for _, x in entries))
    else:  # gathered from several processes, one at a time
        digests = [array_digest(whole(x)) for _, x in entries]
    return leaves_with_state({n: [list(x.shape), str(x.dtype), d] for (n, x), d in zip(entries, digests, strict=True)})


def leaves_with_state(described: dict[str, Any]) -> dict[str, Any]:
    """The same of leaves that are described one by one: name -> [shape, dtype, digest], sorted by name."""
    state = xxhash.xxh3_128(json.dumps(described).encode()).hexdigest()
    return {"leaves": described, "state": state}


def describe_files(folder: Path) -> dict[str, list[int | str]]:
    """Relative name -> [bytes, digest] of every file below a folder."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = _digests(file_digest, paths)
    return {p.relative_to(folder).as_posix(): [p.stat().st_size, d] for p, d in zip(paths, digests, strict=True)}


def render(document: Mapping[str, Any]) -> str:
    """The text of a manifest, which ends with its own digest."""
    body = json.dumps({k: v for k, v in document.items() if k != "digest"}, indent=1)
    return f'{body[:-2]},\n "digest": "{xxhash.xxh3_128(body.encode()).hexdigest()}"\n}}\n'


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder.

    Raises CheckpointCorrupted if it is missing or changed, of another version, or describes too many bytes.
    """
    if folder.is_symlink():
        raise CheckpointCorrupted("its folder is a link")
    try:
        text = Folder(folder).read(NAME, MAX_MANIFEST_BYTES).decode()
        document = json.loads(text)
    except (FileNotFoundError, NotADirectoryError, UnsafeFile) as error:
        raise CheckpointCorrupted(f"its manifest cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointCorrupted("its manifest was changed") from None
    if isinstance(document, dict) and document.get("version") != VERSION:
        raise CheckpointCorrupted(f"its manifest is of version {document.get('version')}, this program reads {VERSION}")
    if not isinstance(document, dict) or render(document) != text:
        raise CheckpointCorrupted("its manifest was changed")
    _check_structure(document, folder.name)
    return document


def _check_structure(document: dict[str, Any], name: str) -> None:
    """Raise CheckpointCorrupted unless `CheckpointStore.save` could have written this manifest."""
    try:
        step, loss, elapsed = document["step"], document["val_loss"], document["elapsed"]
        numbers = [step, elapsed, *([] if loss is None else [loss])]
        leaves = leaves_of(document).values()
        sizes = [size for size, _ in document["files"].values()] + [n for leaf in leaves for n in leaf.shape]
        size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
        usual = (
            type(step) is int and all(-(2**63) < n < 2**63 for n in numbers) and isinstance(document["context"], dict)
        )
        usual &= size <= MAX_ARRAY_BYTES and all(type(n) is int and 0 <= n <= MAX_ARRAY_BYTES for n in sizes)
        usual &= all(leaf.dtype in _DTYPES and len(leaf.shape) <= 32 for leaf in leaves)
    except (KeyError, TypeError, ValueError, AttributeError):
        usual = False
    if not usual:
        raise CheckpointCorrupted("its manifest is not what this program writes")
    if step_number(name) not in (None, document["step"]):
        raise CheckpointCorrupted(f"it is a copy of step {document['step']}")


def leaves_of(document: Mapping[str, Any]) -> dict[str, Leaf]:
    return {name: Leaf(tuple(shape), dtype, digest) for name, (shape, dtype, digest) in document["leaves"].items()}


def verify_files(folder: Path, document: Mapping[str, Any]) -> str | None:
    """The first damage in the files of a checkpoint, in a few words. None if all files are undamaged.

    All sizes are compared before the first file is read. Files that the manifest does not name are ignored, but no link
    may be there: orbax would follow it. Raises OSError if the system refuses to read a file: that is no damage.
    """
    files, expected = Folder(folder), document["files"]
    name = ""
    try:
        for name, (size, _) in expected.items():
            if files.file(name).stat().st_size != size:
                return f"{name} was changed"
        for path in folder.rglob("*"):
            if path.is_symlink():
                return f"{path.relative_to(folder).as_posix()} is a link"
        digests = _digests(file_digest, (folder / name for name in expected))
        for (name, (_, digest)), there in zip(expected.items(), digests, strict=True):
            if there != digest:
                return f"{name} was changed"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename or name).name} is missing"
    except UnsafeFile as error:
        return f"{name} {error.strerror}"
    return None
