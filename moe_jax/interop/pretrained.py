"""A model in a Hugging Face folder, opened: its shape, its tokenizer, and its weights as our parameters.

    opened = Pretrained.open(Path("folder"), "--init-from")
    opened.shape.model       the ModelConfig, with the longest context as `seq_len`
    opened.tokenizer
    opened.params(shapes)    the parameters, in the dtypes of `shapes`

Everything about the files is checked by `open`: names, shapes and sizes of all tensors. `params` then reads the tensors
in parts. In host memory are the parameters that are done, one parameter in the making, and two parts. On a mesh every
process reads all tensors, and keeps its own parts. `imported_run.import_run` keeps none: it writes each parameter to a
file.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from moe_jax.config import UserError
from moe_jax.data.tokenizers import Tokenizer, imported_tokenizer
from moe_jax.interop.huggingface import EMBEDDING, HEAD, Piece, Table, expected, is_fused, table
from moe_jax.interop.pretrained_shape import PretrainedShape, read_shape
from moe_jax.interop.weight_files import DTYPES, WeightFiles
from moe_jax.model.transformer import Params
from moe_jax.runs.arrays import named_leaves
from moe_jax.system.errors import shortened

PART_VALUES = 2**19
"""Most values of a tensor that are read at once."""
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Part(NamedTuple):
    """Some rows of a matrix of the folder, or a vector, and the place that they fill in one of our parameters."""

    parameter: str
    """Its dotted name."""
    piece: Piece
    expert: tuple[int, ...]
    """Index within `piece.place`."""
    columns: slice
    """Of our parameter, whose columns are the tensor's rows."""
    stored: np.ndarray
    """`[columns, inputs]`, or a vector, as the file has it."""

    def values(self) -> np.ndarray:
        """`[inputs, columns]`, or a vector."""
        return self.stored.T

    def put(self, parameter: np.ndarray, values: Any) -> np.ndarray:
        """Fill the columns of a parameter `[*E, inputs, outputs]` with `[inputs, columns]`, or a vector. What has
        another number of rows than the parameter, such as scales, is put in the same way. Returns what was filled."""
        filled = parameter[self.piece.place][self.expert][..., self.columns]
        filled[...] = values
        return filled


def _rows(piece: Piece) -> Iterator[tuple[tuple[int, ...], slice, int]]:
    """The parts of a piece that are read at once: (index of the expert, columns, first row in the tensor)."""
    *above, inputs = piece.shape
    if not above or piece.part == 0:  # a vector, or the only row of a matrix, which is a vector of ours
        yield (), slice(None), 0
        return
    rows = np.broadcast_to(np.arange(math.prod(above)).reshape(*above, 1), piece.shape)[piece.part][..., 0]
    most = max(1, PART_VALUES // inputs)
    for index in np.ndindex(rows.shape[:-1]):
        for begin in range(0, rows.shape[-1], most):
            yield index, slice(begin, min(begin + most, rows.shape[-1])), int(rows[index][begin])


@dataclass(frozen=True)
class Pretrained:
    """A model in a folder, checked but not read."""

    shape: PretrainedShape
    tokenizer: Tokenizer
    weights: WeightFiles

    @classmethod
    def open(cls, folder: Path, flag: str) -> "Pretrained":
        """Open the folder that a flag names. Raises the errors of `read_shape`, and UserError if the tokenizer or the
        weights cannot be read, or do not fit config.json."""
        shape = read_shape(folder, flag)
        tokenizer = _tokenizer(folder, shape)
        opened = cls(shape, tokenizer, WeightFiles.open(folder))
        opened.weights.check(expected(opened.table()), {HEAD} if shape.model.tied_head else set())
        return opened

    def params(self, shapes: Params, fresh: Params | None = None) -> tuple[Params, str]:
        """The parameters, and a digest of all that was read of the folder.

        `shapes` are those of the model (`abstract_model`). A parameter lies where its shape lies: on the first device
        unless it has a sharding. With `fresh`, a model with experts is made of a dense one:
        every expert is a copy of the dense network, and the leaves of `fresh`, by their dotted names, stay as they are.
        Raises UserError if a value is not finite.
        """
        done, digest = dict(fresh or {}), xxhash.xxh3_128(self.shape.text + self.tokenizer.digest.encode())
        leaves = named_leaves(shapes)
        # One buffer for all parameters in the making. Fresh ones would leave holes in the memory of the process.
        scratch = _buffer(max(_bytes(leaf) for leaf in leaves.values()))
        for name, parts in groupby(self.read(self.table(fresh is not None), digest), lambda part: part.parameter):
            leaf = leaves[name]
            made = scratch[: _bytes(leaf)].view(leaf.dtype).reshape(leaf.shape)
            for part in parts:
                self.fill(made, part)
            done[name] = _placed(leaf, made)
        assert done.keys() == leaves.keys(), f"the table of tensors differs by {sorted(done.keys() ^ leaves.keys())}"
        filled = jax.tree.unflatten(jax.tree.structure(shapes), [done[name] for name in leaves])
        return filled, digest.hexdigest()

    def table(self, copies: bool = False) -> Table:
        """Which tensors are which of our parameters. With `copies`, of a model with experts made of a dense one."""
        return table(self.shape.model, self.shape.architecture, is_fused(self.weights.tensors), copies)

    def size(self) -> int:
        """Bytes of all tensors of the model in the folder."""
        tensors = ((self.weights.tensors[name], shape) for name, shape in expected(self.table()).items())
        return sum(math.prod(shape) * DTYPES[tensor.dtype].itemsize for tensor, shape in tensors)

    def read(self, table: Table, digest: xxhash.xxh3_128) -> Iterator[Part]:
        """All parts of all parameters, in the order of the table. The next part is read on a thread, while the caller
        works on the one before. The content is added to `digest`."""
        jobs = ((name, piece, *rows) for name, pieces in table.items() for piece in pieces for rows in _rows(piece))

        def read(name: str, piece: Piece, index: tuple[int, ...], columns: slice, first: int) -> Part:
            tensor = self.weights.tensors[piece.tensor]
            vector = columns.stop is None
            end = None if vector else first + columns.stop - columns.start
            values = tensor.read(first, end)
            digest.update(values.view(np.uint8))
            return Part(name, piece, index, columns, values[piece.part] if vector else values)

        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(read, *job) for job in islice(jobs, 2))
            while ahead:
                part = ahead.popleft().result()
                ahead.extend(reader.submit(read, *job) for job in islice(jobs, 1))
                yield part
        if self.shape.model.tied_head and HEAD in self.weights.tensors:
            self._check_tied()

    def fill(self, parameter: np.ndarray, part: Part) -> None:
        """Put a part in its place. Raises UserError if a value is not finite in the dtype of the parameter."""
        with np.errstate(over="ignore"):  # a value that is too large is named below
            filled = part.put(parameter.T if part.parameter == "embedding" else parameter, part.values())
        self.check_finite(np.isfinite(filled), part, str(parameter.dtype))

    def check_finite(self, finite: np.ndarray, part: Part, dtype: str) -> None:
        """Raise UserError, with the name of its tensor, unless all values of a part are finite in a dtype."""
        if not finite.all():
            where = f"{self.weights.folder}: tensor {part.piece.tensor}"
            raise UserError(f"{where} has NaN or infinite values in {dtype}; download it again")

    def _check_tied(self) -> None:
        """Raise UserError if the folder holds a head that is not its embedding, although config.json ties them."""
        embedding, head = (self.weights.tensors[name].read() for name in (EMBEDDING, HEAD))
        if not np.array_equal(embedding, head):
            raise UserError(
                f"{self.weights.folder}: tensor {HEAD} is not the embedding, and config.json says "
                "tie_word_embeddings; set that to false if the tensor is right"
            )


def _tokenizer(folder: Path, shape: PretrainedShape) -> Tokenizer:
    """The tokenizer of a folder, whose ids the model must know."""
    try:
        file = (folder / TOKENIZER).read_text(encoding="utf-8")
        settings, template = (
            (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else ""
            for name in (TOKENIZER_CONFIG, CHAT_TEMPLATE)
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder / TOKENIZER}: cannot be read ({shortened(str(error))}); open the tokenizer in transformers and "
            "save it again"
        ) from None
    try:
        tokenizer = imported_tokenizer(file, settings, shape.separator, template)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if tokenizer.vocab_size > shape.model.vocab_size:
        raise UserError(
            f"{folder}: {TOKENIZER} has {tokenizer.vocab_size:,} ids, and config.json says vocab_size "
            f"{shape.model.vocab_size:,}; take both from the same folder"
        )
    return tokenizer


def _placed(leaf: jax.ShapeDtypeStruct, made: np.ndarray) -> jax.Array:
    """A copy of `made` on the devices of a leaf: the buffer is used again."""
    if leaf.sharding is not None:
        parts = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: made[index].copy())
        return jax.block_until_ready(parts)
    array = jax.block_until_ready(jax.device_put(made))
    if array.unsafe_buffer_pointer() == made.ctypes.data:
        array = jax.block_until_ready(jax.device_put(made.copy()))
    return array


def _buffer(size: int) -> np.ndarray:
    """Memory that jax copies on a CPU too. It would use a buffer in place that begins at a multiple of 64 bytes, and
    `may_alias=False` does not prevent that (jax 0.12)."""
    memory = np.empty(size + 128, np.uint8)
    return memory[(32 - memory.ctypes.data) % 64 :]


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize
