"""The tensors of a Hugging Face folder: model.safetensors, or several such files with an index.

A safetensors file is a header in JSON, which says the dtype, shape and place of each tensor, and then the tensors. The
header is checked completely before any tensor is read: the tensors must fill the rest of the file, one after another,
without a gap. Files that hold pickled Python objects (`pytorch_model.bin`) are never opened: reading one can run code.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.config import UserError
from moe_jax.interop.pretrained_shape import open_file, read_file
from moe_jax.system.errors import shortened
from moe_jax.system.files import MAX_JSON_BYTES, parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BITS = {"F64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}
"""Dtypes that are known, and that no weight may have."""
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|h5|msgpack|gguf)")


class Tensor(NamedTuple):
    """A tensor in a file. Nothing of it is read yet."""

    file: BinaryIO
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    def map(self) -> np.ndarray:
        """The tensor, mapped into memory: pages of the file are read when they are used. Read-only."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a folder, by name."""

    folder: Path
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, folder: Path) -> "WeightFiles":
        """Read the headers of all files. Raises UserError if one is missing, damaged, or of another form."""
        try:
            if (folder / SINGLE).exists():
                return cls(folder, _tensors(folder, SINGLE))
            if (folder / INDEX).exists():
                return cls(folder, _sharded(folder))
            names = sorted(path.name for path in folder.iterdir())
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
        pickled = next((name for name in names if _PICKLED.fullmatch(name)), None)
        if pickled is None:
            raise UserError(f"{folder}: has no {SINGLE}; download it, or the whole folder again")
        raise UserError(
            f"{folder}: has its weights in {pickled}, and only {SINGLE} is read, because it cannot run code; open the "
            "folder in transformers and save it again"
        )

    def check(self, expected: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
        """Raise UserError unless the tensors are those that are expected, with their shapes. Names the tensor."""
        for name, shape in expected.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise UserError(
                    f"{self.folder}: has no tensor {name}, which its config.json asks for; download the folder again"
                )
            if tensor.shape != shape:
                raise UserError(
                    f"{self.folder}: tensor {name} has shape {list(tensor.shape)}, and config.json gives "
                    f"{list(shape)}; take both from the same folder"
                )
        for name in self.tensors:
            if name not in expected and name not in ignored and not name.endswith(".rotary_emb.inv_freq"):
                raise UserError(
                    f"{self.folder}: has the tensor {_printable(name)}, which a model of its config.json has not; "
                    "take config.json and the weights from the same folder"
                )


def _sharded(folder: Path) -> dict[str, Tensor]:
    try:
        index = parse_json(read_file(folder, INDEX, MAX_JSON_BYTES))
    except ValueError as error:
        raise UserError(f"{folder / INDEX}: is not JSON ({str(error)[:60]}); download the file again") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{folder / INDEX}: has no `weight_map` of names to files; download the file again")
    files = sorted(set(names.values()))
    for file in files:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors", file):
            raise UserError(
                f"{folder / INDEX}: names the file {_printable(file)}, which is no name of a .safetensors file"
            )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).exists():
            raise UserError(f"{folder / file}: is missing, and {INDEX} names it; download it")
        for name, tensor in _tensors(folder, file).items():
            if names.get(name) != file:
                raise UserError(
                    f"{folder / file}: has the tensor {_printable(name)}, which {INDEX} does not place there"
                )
            tensors[name] = tensor
    for name, file in names.items():
        if name not in tensors:
            raise UserError(f"{folder / file}: has no tensor {_printable(name)}, which {INDEX} places there")
    return tensors


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file. The file stays open, so that its tensors are those of the header that was checked."""
    path, file = folder / name, open_file(folder, name)
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(
            f"{path}: its header ends after the file, at byte {8 + length:,} of {size:,}; download it again"
        )
    if length > MAX_JSON_BYTES:
        raise UserError(f"{path}: its header has {length:,} bytes, and at most {MAX_JSON_BYTES:,} are read")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not JSON ({str(error)[:80]}); download it again") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    return dict(_in_order(path, file, header, 8 + length, size))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("it has a name twice")
    return mapping


def _in_order(
    path: Path, file: BinaryIO, header: dict[str, Any], start: int, size: int
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in the order of the file, checked to begin where the one before ends."""
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    at = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at or end > size - start:
            cause = "ends after the file" if end > size - start else "does not begin where the one before it ends"
            raise UserError(f"{path}: tensor {_printable(name)} {cause} ({begin:,} to {end:,}); download it again")
        at = end
        yield name, Tensor(file, dtype, shape, start + begin)
    if at != size - start:
        raise UserError(f"{path}: has {size - start - at:,} bytes after its last tensor; download it again")


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """The dtype, the shape and the place of a tensor. Raises UserError if they contradict each other."""
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    ok = isinstance(kind, str) and _sizes(shape) and len(shape) <= 8 and _sizes(place) and len(place) == 2
    if not ok:
        raise UserError(
            f"{path}: tensor {_printable(name)} has no usable dtype, shape and data_offsets; download it again"
        )
    if kind not in DTYPES:
        known = "" if kind in _BITS else "the unknown "
        raise UserError(
            f"{path}: tensor {_printable(name)} has {known}dtype {_printable(kind)}, must be one of "
            f"{', '.join(DTYPES)}; open the folder in transformers and save it in one of these"
        )
    begin, end = place
    if math.prod(shape) * DTYPES[kind].itemsize != end - begin:
        raise UserError(
            f"{path}: tensor {_printable(name)} of shape {shape} has {end - begin:,} bytes; download it again"
        )
    return DTYPES[kind], tuple(shape), begin, end


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _printable(text: str) -> str:
    """A name out of a file, in printable characters."""
    text = text.encode("ascii", "backslashreplace").decode()
    return shortened("".join(c if c.isprintable() else "?" for c in text), 120)
