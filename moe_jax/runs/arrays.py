"""The arrays of a checkpoint by name, and files of safetensors.

Arrays are saved by name, not by structure. An array named `params.blocks.0.ffn.router` can be read without the classes
that wrote it. The parameters, and adapters if there are any, are in weights.safetensors; adapters have `adapters.`
before their names there, parameters have no prefix.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.parallel.processes import gather_to_host, is_process_zero
from moe_jax.runs.manifest import CheckpointCorrupted

WEIGHTS = "weights.safetensors"
PARAMS, ADAPTERS = "params.", "adapters."
_SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}
_DTYPES = {name: dtype for dtype, name in _SAFETENSORS.items()}

type Shapes = dict[str, jax.ShapeDtypeStruct]
"""Name of an array -> its shape and dtype. With a sharding, this says where the array is read to."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path: {"params.blocks.0.ffn.router": array, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def is_weight(name: str) -> bool:
    """Whether an array of this name is in weights.safetensors. The rest is the state of training."""
    return name.startswith((PARAMS, ADAPTERS))


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
        """Close the file, once it is on the disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def write_weights(folder: Path, leaves: Mapping[str, Any]) -> None:
    """Write the parameters and adapters among the leaves as the weights.safetensors of a folder. Of several processes,
    all must call this, and process 0 gathers and writes the arrays."""
    weights = {name: leaf for name, leaf in sorted(leaves.items()) if is_weight(name)}
    if not is_process_zero():
        for leaf in weights.values():
            gather_to_host(leaf)
        return
    shapes = {name.removeprefix(PARAMS): leaf for name, leaf in weights.items()}
    with SafetensorsWriter(folder / WEIGHTS, shapes) as writer:
        for leaf in weights.values():
            writer.add(gather_to_host(leaf))


def weight_shapes(path: Path) -> Shapes:
    """The arrays in a file that `write_weights` has written. Raises CheckpointCorrupted if it is no such file."""
    try:
        with safe_open(path, "numpy", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            shapes = {
                name: (stored.get_shape(), np.dtype(_DTYPES[stored.get_dtype()])) for name, stored in slices.items()
            }
    except (SafetensorError, KeyError) as error:
        raise unreadable("weights", error) from None
    return {
        name if is_weight(name) else PARAMS + name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, dtype) in shapes.items()
    }


def read_weights(path: Path, wanted: Shapes) -> dict[str, jax.Array]:
    """Read some parameters and adapters. Each device reads its own parts; an array without a sharding lies on the first
    device. Raises CheckpointCorrupted if the file is damaged.

    A file that is mapped into memory and then cut would end the process, so it is read by `pread`.
    """
    arrays = {}
    try:
        with safe_open(path, "numpy", backend="pread") as file:
            for name, leaf in wanted.items():
                part = partial(_part_of, file.get_slice(name.removeprefix(PARAMS)))
                arrays[name] = jax.make_array_from_callback(leaf.shape, sharding_of(leaf), part)
    except SafetensorError as error:
        raise unreadable("weights", error) from None
    return arrays


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
    """Where an array is read to: the sharding of its leaf, else the first device of this process."""
    return getattr(leaf, "sharding", None) or jax.device_put(0, jax.local_devices()[0]).sharding


def _part_of(stored: Any, index: Any) -> np.ndarray:
    return np.asarray(stored[index or ...])


def unreadable(what: str, error: Exception) -> CheckpointCorrupted:
    """The error for a file that a library cannot read, in one line."""
    return CheckpointCorrupted(f"its {what} cannot be read ({' '.join(str(error).split())[:200]})")
