"""The manifest of a checkpoint: sizes and digests of its files, and what the checkpoint is.

    {"version": 4, "step": ..., "val_loss": ..., "elapsed": ..., "context": {...}, "versions": {...},
     "files": {"weights.safetensors": [bytes, xxh3-128], "arrays/d/...": [...], ...}, "digest": ...}

Orbax itself does not notice a flipped bit: it returns a wrong number. So the digests of the files are compared before
anything is restored. The last key, `digest`, is computed from the text before it, so a change anywhere in the manifest
is noticed. (SHA-256 would take half the time of a whole save.)

A manifest of version 3 also has a digest of each array. It is read like one of version 4.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from moe_jax.config import UserError
from moe_jax.system.files import file_digest, write_atomically

NAME = "manifest.json"
VERSION = 4
READABLE = (3, VERSION)


class CheckpointCorrupted(UserError):
    """A damaged checkpoint: what was read is wrong, or is not there. The text names the damage in a few words.

    If the system refuses to read a file, that is no damage, and the OSError is raised: the checkpoint may well be
    whole, so it is never passed over for an older one or renamed.
    """


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, list[int | str]]:
    """Name relative to the folder -> [bytes, digest] of some files in it.

    Reading and xxh3 release Python's GIL, so a second core halves the time.
    """
    paths = sorted(paths)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_digest, paths))
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(paths, digests, strict=True)
    }


def render(document: Mapping[str, Any]) -> str:
    """The text of a manifest, which ends with its own digest."""
    body = json.dumps({k: v for k, v in document.items() if k != "digest"}, indent=1)
    return f'{body[:-2]},\n "digest": "{xxhash.xxh3_128(body.encode()).hexdigest()}"\n}}\n'


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint, or replace it."""
    write_atomically(folder / NAME, render(document))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder.

    Raises CheckpointCorrupted if it is missing, was changed, is of another version, or names a file outside of the
    folder.
    """
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        document = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorrupted("its manifest is missing") from None
    except (ValueError, RecursionError):
        raise CheckpointCorrupted("its manifest was changed") from None
    if isinstance(document, dict) and document.get("version") not in READABLE:
        raise CheckpointCorrupted(f"its manifest is of version {document.get('version')}, this program reads {VERSION}")
    if not isinstance(document, dict) or render(document) != text:
        raise CheckpointCorrupted("its manifest was changed")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in document["files"]):
        raise CheckpointCorrupted("its manifest names a file outside of its folder")
    return document


def damage(folder: Path, document: Mapping[str, Any]) -> str | None:
    """The first damage in the files of a checkpoint, in a few words. None if all files are undamaged.

    Files that the manifest does not name are ignored: nothing that is restored depends on them. Raises OSError if the
    system refuses to read a file.
    """
    expected = document["files"]
    try:
        found = describe_files(folder, map(folder.joinpath, expected))
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    return next((f"{name} was changed" for name in expected if found[name] != expected[name]), None)
