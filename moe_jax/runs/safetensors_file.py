"""Files of safetensors, written one tensor at a time. Without jax, so that an export starts at once.

A file is the length of its header (8 bytes, little-endian), the header (JSON, filled up with spaces to a multiple of 8
bytes), and the bytes of the tensors in C order. The wider dtypes come first, and within a dtype the names are sorted.
These are the bytes that the library `safetensors` writes (its format, version 0.8). The library needs all tensors at
once; here only one must exist at a time.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""Name in numpy -> name in the format, in the order of the format."""


class Described(Protocol):
    """What the header says of a tensor: an array or its shape and dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


def file_order(tensors: Mapping[str, Described]) -> list[str]:
    """The names in the order in which `write_safetensors` asks for the tensors."""
    places = {name: place for place, name in enumerate(_DTYPES)}
    return sorted(tensors, key=lambda name: (-places[str(tensors[name].dtype)], name))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Described],
    values: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file of tensors. `values(name)` is called once for each, in `file_order`, and is written before the
    next call. So one tensor must fit into memory, and not all.

    Raises FileExistsError if there is a file of this name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in file_order(tensors):
        x = tensors[name]
        begin, end = end, end + math.prod(x.shape) * np.dtype(x.dtype).itemsize
        header[name] = {"dtype": _DTYPES[str(x.dtype)], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in file_order(tensors):
            file.write(_bytes(values(name)))  # no name for the values: they must be gone before the next


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
