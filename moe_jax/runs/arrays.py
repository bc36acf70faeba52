"""The arrays of a checkpoint: written and read by orbax, and the parameters once more as safetensors.

Orbax stores each array as zarr in one OCDBT database. Its metadata says how large a chunk is. So the metadata of each
array is compared with the manifest before the first array is read: a chunk of another size would take any amount of
memory.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from moe_jax.parallel.global_arrays import whole
from moe_jax.parallel.processes import first, several
from moe_jax.runs import manifest
from moe_jax.runs.manifest import CheckpointCorrupted, CheckpointUnreadable
from moe_jax.runs.safetensors_file import file_order, write_safetensors
from moe_jax.system.folders import Folder

WEIGHTS = "weights.safetensors"
ARRAYS = "arrays"
PARAMS, ADAPTERS = "params.", "adapters."
_MAX_METADATA_BYTES = 2**16
"""Largest zarr metadata of one array. Orbax writes 150 bytes."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path: {"params.blocks.0.ffn.router": array, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def write_arrays(folder: Path, leaves: dict[str, Any]) -> None:
    """Write all arrays. Of several processes, all call this, and each writes its own parts."""
    with without_traces(), _checkpointer({*range(jax.process_count())}) as checkpointer:
        checkpointer.save((folder / ARRAYS).resolve(), leaves)


def _checkpointer(processes: set[int]) -> ocp.Checkpointer:
    """A checkpointer for which these processes wait for each other: all to write, each alone to read."""
    # Without compression: trained weights hardly compress, and zstd took most of the time of a save.
    if not several():
        return ocp.PyTreeCheckpointer(use_compression=False)
    # Orbax waits by a program on the devices unless it is told which processes there are.
    options = ocp.options.MultiprocessingOptions(primary_host=min(processes), active_processes=processes)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def read_arrays(
    path: Path, wanted: dict[str, manifest.Leaf], shardings: Mapping[str, jax.sharding.Sharding | None] | None = None
) -> dict[str, jax.Array]:
    """Read the `wanted` leaves, and compare each with its digest. A leaf is laid out by its sharding, on the first
    device unless given.

    Raises CheckpointCorrupted if one is damaged, and CheckpointUnreadable if the system refuses to read one.
    """
    _check_stored(path / ARRAYS, wanted)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {name: (shardings or {}).get(name) or here for name in wanted}
    item = {n: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype), sharding=places[n]) for n, x in wanted.items()}
    try:
        with without_traces(), _checkpointer({jax.process_index()}) as checkpointer:
            arrays = checkpointer.restore(
                (path / ARRAYS).resolve(),
                args=ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # of any class, if files contradict each other: orbax raises `Exception` itself too
        raise _read_error(path, error) from error
    described = manifest.describe_leaves(arrays)["leaves"]
    for name, leaf in wanted.items():
        if described[name][2] != leaf.digest:
            raise CheckpointCorrupted(f"{name} is not the array that was saved")
    return arrays


def _check_stored(folder: Path, wanted: dict[str, manifest.Leaf]) -> None:
    """Compare what orbax's files say about each leaf with the manifest. No array is read.

    Raises CheckpointCorrupted if an array is stored in another form than `write_arrays` gives it: another shape or size
    of an entry, a chunk larger than the array, a compressed chunk, another format.
    """
    try:
        about = Folder(folder).read_json("_METADATA", manifest.MAX_METADATA_BYTES)
        if about.get("use_ocdbt") is not True or about.get("use_zarr3") not in (False, None):
            raise CheckpointCorrupted("its arrays are stored in another format")
        base = {"driver": "file", "path": f"{folder.resolve().as_posix()}/"}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        found = {name: store.read(f"{name}/.zarray") for name in wanted}
        for name, leaf in wanted.items():
            text = found[name].result().value
            if len(text) > _MAX_METADATA_BYTES or not _fits(json.loads(text), leaf):
                raise CheckpointCorrupted(f"{name[:80]} is stored with another shape than its manifest gives it")
    except CheckpointCorrupted:
        raise
    except Exception as error:
        raise _read_error(folder, error) from error


def _fits(zarr: dict[str, Any], leaf: manifest.Leaf) -> bool:
    """Whether zarr's metadata describes this leaf, in chunks that are no larger than the leaf."""
    shape, chunks = zarr["shape"], zarr["chunks"]
    usual = shape == list(leaf.shape) and len(chunks) == len(shape) and zarr["zarr_format"] == 2
    usual = usual and all(type(c) is int and 1 <= c <= max(n, 1) for c, n in zip(chunks, shape, strict=True))
    plain = zarr.get("compressor") is None and not zarr.get("filters")
    return usual and plain and _item_bytes(zarr["dtype"]) == np.dtype(leaf.dtype).itemsize


def _item_bytes(name: Any) -> int:
    if name == "bfloat16":
        return 2
    return np.dtype(name).itemsize if isinstance(name, str) and re.fullmatch(r"[<|][biuf]\d", name) else -1


def _read_error(path: Path, error: Exception) -> CheckpointCorrupted | CheckpointUnreadable:
    """The error for the user: whether the system refused to read, or what was read is wrong.

    Raises the error itself if memory ran out. Tensorstore puts the number of a system error into its text.
    """
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise error  # too little memory is no damage
    found = re.search(r"OS error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in (None, errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.EFBIG, errno.EISDIR, errno.ELOOP):
        return CheckpointUnreadable.because(path, OSError(number, os.strerror(number)))
    return CheckpointCorrupted(f"its arrays cannot be read ({' '.join(str(error).split())[:200]})")


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """Silence orbax's threads, and the event loop in which they run: both log a traceback for every error. The one line
    of our UserError is enough.

    After an error they stay silent: a thread that ends later logs the same error, and no caller is left to catch it.
    """
    _ignore_late_answers()
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    yield
    for log, level in zip(logs, levels, strict=True):
        log.setLevel(level)


@functools.cache
def _ignore_late_answers() -> None:
    """Silence threads of tensorstore that finish after orbax gave up and closed its event loop.

    There is no caller left that could catch their error, so Python would print a traceback.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def write_weights(folder: Path, leaves: dict[str, Any]) -> None:
    """Write the parameters as safetensors; adapters too, with `adapters.` before their names. Only one of them is
    gathered at a time. Of several processes, all must call this, and the first one writes."""
    chosen = {n.removeprefix(PARAMS): x for n, x in sorted(leaves.items()) if n.startswith((PARAMS, ADAPTERS))}
    if first():
        write_safetensors(folder / WEIGHTS, chosen, lambda name: whole(chosen[name]))
        return
    for name in file_order(chosen):
        whole(chosen[name])
