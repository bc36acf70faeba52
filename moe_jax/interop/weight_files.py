"""The tensors of a Hugging Face folder: model.safetensors, or several such files with an index.

A safetensors file is a header in JSON, which says the dtype, shape and place of each tensor, and then the tensors. The
library `safetensors` checks the header before any tensor is read. Files that hold pickled Python objects
(`pytorch_model.bin`) are never opened: reading one can run code.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.config import UserError
from moe_jax.interop.model_folder import open_file, read_file
from moe_jax.system.errors import shortened
from moe_jax.system.files import MAX_JSON_BYTES, parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|h5|msgpack|gguf)")


class Tensor(NamedTuple):
    """A tensor in a file. Nothing of it is read yet."""

    file: BinaryIO
    dtype: str
    """The name that the file gives. `WeightFiles.check` accepts those of `DTYPES` only."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    def read(self, first: int = 0, end: int | None = None) -> np.ndarray:
        """The tensor, or some rows of it, in memory, read-only. Rows are numbered through all axes but the last.

        A file that is mapped and then cut would end the process (SIGBUS). Raises UserError if the file has been cut
        since its header was read.
        """
        dtype, row = DTYPES[self.dtype], self.shape[-1] if self.shape else 1
        shape = self.shape if end is None else (end - first, row)
        self.file.seek(self.offset + first * row * dtype.itemsize)
        content = self.file.read(size := math.prod(shape) * dtype.itemsize)
        if len(content) < size:
            raise UserError(f"{self.file.name}: has become shorter while it was read; download it again")
        return np.frombuffer(content, dtype).reshape(shape)


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
                    f"{self.folder}: tensor {name} has shape {shortened(str(list(tensor.shape)))}, and config.json "
                    f"gives {list(shape)}; take both from the same folder"
                )
        for name, tensor in self.tensors.items():
            if name not in expected and name not in ignored and not name.endswith(".rotary_emb.inv_freq"):
                raise UserError(
                    f"{self.folder}: has the tensor {_printable(name)}, which a model of its config.json has not; "
                    "take config.json and the weights from the same folder"
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{self.folder}: tensor {name} has dtype {tensor.dtype}, must be one of {', '.join(DTYPES)}; open "
                    "the folder in transformers and save it in one of these"
                )


def _sharded(folder: Path) -> dict[str, Tensor]:
    try:
        index = parse_json(read_file(folder, INDEX, MAX_JSON_BYTES))
    except ValueError as error:
        raise UserError(f"{folder / INDEX}: is not JSON ({str(error)[:60]}); download the file again") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / INDEX}: has no `weight_map` of names to files; download the file again")
    files = sorted(set(places.values()))
    for file in files:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors", file):
            raise UserError(
                f"{folder / INDEX}: names the file {_printable(file)}, which is no name of a .safetensors file"
            )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).exists():
            raise UserError(f"{folder / file}: is missing, and {INDEX} names it; download it")
        inside = _tensors(folder, file)
        other = sorted(inside.keys() ^ {name for name, place in places.items() if place == file})
        if other:
            raise UserError(
                f"{folder / file}: has other tensors than {INDEX} says, such as {_printable(other[0])}; take all files "
                "from the same folder"
            )
        tensors |= inside
    return tensors


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file, which stays open."""
    from safetensors import SafetensorError, safe_open

    file = open_file(folder, name)
    try:
        with safe_open(folder / name, "numpy"):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder / name}: is no whole safetensors file ({_printable(str(error))}); download it again"
        ) from None
    header.pop("__metadata__", None)
    return {
        tensor: Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for tensor, entry in header.items()
    }


def _printable(text: str) -> str:
    """A name out of a file, in printable characters."""
    text = text.encode("ascii", "backslashreplace").decode()
    return shortened("".join(c if c.isprintable() else "?" for c in text), 120)
