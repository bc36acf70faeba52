"""The tensors of a Hugging Face folder: model.safetensors, or several such files with an index.

A safetensors file is a header in JSON, which says the dtype, shape and place of each tensor, and then the tensors. The
library `safetensors` checks the header before any tensor is read. Files that hold pickled Python objects
(`pytorch_model.bin`) are never opened: reading one can run code.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.config import UserError
from moe_jax.system.errors import shortened
from moe_jax.system.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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
            if not (folder / INDEX).exists() or (folder / SINGLE).exists():
                return cls(folder, _tensors(folder / SINGLE))
            files = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
            if odd := [file for file in files if not re.fullmatch(r"\w[\w.\-]*\.safetensors", file)]:
                raise ValueError(f"{INDEX} names {odd[0]!a}, which is no name of a .safetensors file")
            parts = [_tensors(folder / file) for file in files]
            tensors = {name: tensor for part in parts for name, tensor in part.items()}
            if len(tensors) < sum(map(len, parts)):
                twice, _ = Counter(name for part in parts for name in part).most_common(1)[0]
                raise ValueError(f"the tensor {twice} stands in two files")
            return cls(folder, tensors)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder}: its weights cannot be read ({_printable(str(error))}); download it again. Only {SINGLE} "
                f"and files that {INDEX} names are read: files of other kinds can run code"
            ) from None

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


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, which stays open."""
    file = path.open("rb")
    with safe_open(path, "numpy"):  # checks the header
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        tensor: Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for tensor, entry in header.items()
    }


def _printable(text: str) -> str:
    """A name out of a file, in printable characters."""
    text = text.encode("ascii", "backslashreplace").decode()
    return shortened("".join(c if c.isprintable() else "?" for c in text), 120)
