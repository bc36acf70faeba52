"""The arrays of a checkpoint: the parameters as safetensors, and the whole state of training by orbax.

Orbax stores each array as zarr in one OCDBT database. Its metadata says how large a chunk is. So the metadata of each
array is compared with the manifest before the first array is read: a chunk of another size would take any amount of
memory.

Orbax is imported by the first save, or when a training goes on: its import takes as long as a sixth of a start.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.parallel.processes import first, several, whole
from moe_jax.runs import manifest
from moe_jax.runs.manifest import CheckpointCorrupted

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

WEIGHTS = "weights.safetensors"
ARRAYS = "arrays"
PARAMS, ADAPTERS = "params.", "adapters."
_SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}
_OTHER_SHAPE = "{} is stored with another shape than its manifest gives it"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path: {"params.blocks.0.ffn.router": array, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def write_arrays(folder: Path, leaves: dict[str, Any]) -> None:
    """Write all arrays. Of several processes, all call this, and each writes its own parts."""
    with _without_traces(), _checkpointer({*range(jax.process_count())}) as checkpointer:
        checkpointer.save((folder / ARRAYS).resolve(), leaves)


def _checkpointer(processes: set[int]) -> "ocp.Checkpointer":
    """A checkpointer for which these processes wait for each other: all to write, each alone to read."""
    import orbax.checkpoint as ocp

    # Without compression: trained weights hardly compress, and zstd took most of the time of a save.
    if not several():
        return ocp.PyTreeCheckpointer(use_compression=False)
    # Orbax waits by a program on the devices unless it is told which processes there are.
    options = ocp.options.MultiprocessingOptions(primary_host=min(processes), active_processes=processes)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def is_trained(names: Iterable[str]) -> bool:
    """Whether there are leaves of a training's state beside the parameters, which are weights.safetensors alone."""
    return not all(name.startswith((PARAMS, ADAPTERS)) for name in names)


type Places = Mapping[str, jax.sharding.Sharding]


def read_arrays(
    path: Path, wanted: dict[str, manifest.Leaf], shardings: Mapping[str, jax.sharding.Sharding | None] | None = None
) -> dict[str, jax.Array]:
    """Read the `wanted` leaves, and compare each with its digest. A leaf is laid out by its sharding, on the first
    device if it has none.

    Raises CheckpointCorrupted if one is damaged.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {name: (shardings or {}).get(name) or here for name in wanted}
    arrays = (_read_state if is_trained(wanted) else _read_weights)(path, wanted, places)
    described = manifest.describe_leaves(arrays)["leaves"]
    for name, leaf in wanted.items():
        if described[name] != [list(leaf.shape), leaf.dtype, leaf.digest]:
            raise CheckpointCorrupted(f"{name} is not the array that was saved")
    return arrays


def _read_weights(path: Path, wanted: dict[str, manifest.Leaf], places: Places) -> dict[str, jax.Array]:
    """Parameters and adapters. Each device reads its own parts. A file that is mapped into memory and then cut would
    end the process, so it is read by `pread`."""
    arrays = {}
    try:
        with safe_open(path / WEIGHTS, "numpy", backend="pread") as file:
            for name, leaf in wanted.items():
                stored = file.get_slice(name.removeprefix(PARAMS))
                if tuple(stored.get_shape()) != leaf.shape:
                    raise CheckpointCorrupted(_OTHER_SHAPE.format(name[:80]))
                part = partial(_part_of, stored)
                arrays[name] = jax.make_array_from_callback(leaf.shape, places[name], part)
    except SafetensorError as error:
        raise CheckpointCorrupted(f"its weights cannot be read ({' '.join(str(error).split())[:200]})") from error
    return arrays


def _part_of(stored: Any, index: Any) -> np.ndarray:
    return np.asarray(stored[index or ...])


def _read_state(path: Path, wanted: dict[str, manifest.Leaf], places: Places) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    item = {n: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype), sharding=places[n]) for n, x in wanted.items()}
    folder = (path / ARRAYS).resolve()
    try:
        with _without_traces(), _checkpointer({jax.process_index()}) as checkpointer:
            _check_stored(checkpointer.metadata(folder), wanted)
            return checkpointer.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # of any class, if files contradict each other: orbax raises `Exception` itself too
        if isinstance(error, CheckpointCorrupted | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # too little memory is no damage
        system = re.search(r"OS error (\d+)", str(error))  # of tensorstore
        if system and int(system[1]) != errno.ENOENT:  # nor is what the system refuses to read
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(folder)) from error
        raise CheckpointCorrupted(f"its arrays cannot be read ({' '.join(str(error).split())[:200]})") from error


def _check_stored(metadata: Any, wanted: dict[str, manifest.Leaf]) -> None:
    """Raise CheckpointCorrupted unless orbax's files describe each leaf as the manifest does, in chunks that are not
    larger than the leaf. No array has been read."""
    stored = metadata.item_metadata.tree
    for name, leaf in wanted.items():
        there = stored[name]
        usual = (tuple(there.shape), str(there.dtype)) == (leaf.shape, leaf.dtype)
        chunk = there.storage.chunk_shape if there.storage else ()  # a scalar of numpy has none
        if not usual or any(c > max(n, 1) for c, n in zip(chunk, leaf.shape, strict=True)):
            raise CheckpointCorrupted(_OTHER_SHAPE.format(name[:80]))


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Silence orbax's threads, and the event loop in which they run: both log a traceback for every error. The one line
    of our UserError is enough. The logs of other programs of this process, such as a server, speak again afterwards.

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
    """Silence threads of tensorstore that finish after orbax gave up and closed its event loop. No caller is left that
    could catch their error, so Python would print a traceback."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def write_weights(folder: Path, leaves: dict[str, Any]) -> None:
    """Write the parameters as safetensors; adapters too, with `adapters.` before their names. Of several processes, all
    must call this, and the first one gathers and writes them."""
    gathered = {}
    for name, leaf in sorted(leaves.items()):
        if name.startswith((PARAMS, ADAPTERS)):
            array = whole(leaf)
            if first():
                gathered[name.removeprefix(PARAMS)] = array
    if first():
        with SafetensorsWriter(folder / WEIGHTS, gathered) as writer:
            for array in gathered.values():
                writer.add(array)


class SafetensorsWriter:
    """A new file of tensors, written one after another: none of them stays in memory."""

    def __init__(self, path: Path, shapes: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
        """`shapes` has the shape and dtype of every tensor, in the order in which they will be added.

        Raises FileExistsError if there is a file of this name.
        """
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, x in shapes.items():
            begin, end = end, end + x.size * x.dtype.itemsize
            header[name] = {"dtype": _SAFETENSORS[str(x.dtype)], "shape": list(x.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, array: np.ndarray) -> None:
        """Write the next tensor."""
        self._file.write(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class WeightsWriter(SafetensorsWriter):
    """The weights of a checkpoint, written one array after another."""

    def __init__(self, folder: Path, shapes: Mapping[str, Any]) -> None:
        super().__init__(folder / WEIGHTS, shapes)
        self._names = iter(shapes)
        self._leaves: dict[str, Any] = {}

    def add(self, array: np.ndarray) -> None:
        super().add(array)
        name = PARAMS + next(self._names)
        self._leaves[name] = [list(array.shape), str(array.dtype), manifest.array_digest(array)]

    def described(self) -> dict[str, Any]:
        """What `manifest.describe_leaves` says of the arrays."""
        return manifest.leaves_with_state(dict(sorted(self._leaves.items())))
