"""A model in a Hugging Face folder, opened: its shape, its tokenizer, and its weights as our parameters.

    opened = Pretrained.open(Path("folder"), "--init-from")
    opened.shape.model       the ModelConfig, with the longest context as `seq_len`
    opened.tokenizer
    opened.params(shapes)    the parameters, in the dtypes of `shapes`

Everything about the files is checked by `open`: names, shapes and sizes of all tensors. `params` then reads one tensor
after another. In host memory are the parameters that are done, and one parameter in the making. On a mesh every process
reads all tensors, and keeps its own parts.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from moe_jax.config import UserError
from moe_jax.data.tokenizers import Tokenizer, imported_tokenizer
from moe_jax.interop.huggingface import EMBEDDING, HEAD, Piece, Table, expected, is_fused, table
from moe_jax.interop.pretrained_shape import PretrainedShape, read_file, read_shape
from moe_jax.interop.weight_files import WeightFiles
from moe_jax.model.transformer import Params
from moe_jax.system.files import MAX_JSON_BYTES

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


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
        layers, experts, there = shape.model.layers, shape.model.experts, len(opened.weights.tensors)
        if layers * (1 if is_fused(opened.weights.tensors) else experts) > there:  # before a table of that size is made
            raise UserError(
                f"{folder}: config.json gives {layers:,} layers of {experts:,} experts, and the weight files have "
                f"{there:,} tensors; take both from the same folder"
            )
        opened.weights.check(expected(opened._table()), {HEAD} if shape.tied else set())
        return opened

    def params(self, shapes: Params, fresh: Params | None = None) -> tuple[Params, str]:
        """The parameters, and a digest of all that was read of the folder.

        `shapes` are those of the model (`abstract_model`). A parameter lies where its shape lies: on the first device
        unless it has a sharding. With `fresh`, a model with experts is made of a dense one:
        every expert is a copy of the dense network, and the leaves of `fresh`, by their dotted names, stay as they are.
        Raises UserError if a value is not finite.
        """
        pieces = self._table(copies=fresh is not None)
        digests: dict[str, str] = {}
        # One buffer for all parameters in the making. Fresh ones would leave holes in the memory of the process.
        scratch = _buffer(max(_bytes(leaf) for leaf in jax.tree.leaves(shapes)))

        def fill(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if fresh is not None and name in fresh:
                return fresh[name]
            return self._parameter(leaf, pieces.pop(name), scratch, digests)

        filled = jax.tree_util.tree_map_with_path(fill, shapes)
        assert not pieces, f"the model has no place for {sorted(pieces)}"
        if self.shape.tied and HEAD in self.weights.tensors:
            self._check_tied()
        parts = [self.shape.text.hex(), self.tokenizer.digest, sorted(digests.items())]
        return filled, xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def _table(self, copies: bool = False) -> Table:
        return table(self.shape, is_fused(self.weights.tensors), copies)

    def _parameter(
        self, leaf: jax.ShapeDtypeStruct, pieces: list[Piece], scratch: np.ndarray, digests: dict[str, str]
    ) -> jax.Array:
        made = scratch[: _bytes(leaf)].view(leaf.dtype).reshape(leaf.shape)
        for piece in pieces:
            source = self.weights.tensors[piece.tensor].read()
            if piece.tensor not in digests:
                digests[piece.tensor] = xxhash.xxh3_128_hexdigest(source.view(np.uint8))
            target = made[piece.place]
            with np.errstate(over="ignore"):  # a value that is too large for the dtype is named below
                target[...] = piece.of(source)
            del source  # before the next tensor is read
            if not np.isfinite(target).all():
                raise UserError(
                    f"{self.weights.folder}: tensor {piece.tensor} has NaN or infinite values in {leaf.dtype}; "
                    "download it again"
                )
        if leaf.sharding is not None:
            # Copies of the parts, because the buffer is used again.
            return jax.block_until_ready(
                jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: made[index].copy())
            )
        array = jax.block_until_ready(jax.device_put(made))
        if array.unsafe_buffer_pointer() == made.ctypes.data:  # not copied, and the buffer is used again
            array = jax.block_until_ready(jax.device_put(made.copy()))
        return array

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
        file = read_file(folder, TOKENIZER, MAX_JSON_BYTES // 2).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{folder / TOKENIZER}: {why}; open the tokenizer in transformers and save it again") from None
    settings = ""
    with suppress(OSError, UnicodeDecodeError):
        settings = read_file(folder, TOKENIZER_CONFIG, 1 << 22).decode()
    try:
        tokenizer = imported_tokenizer(file, settings, shape.separator)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if tokenizer.vocab_size > shape.model.vocab_size:
        raise UserError(
            f"{folder}: {TOKENIZER} has {tokenizer.vocab_size:,} ids, and config.json says vocab_size "
            f"{shape.model.vocab_size:,}; take both from the same folder"
        )
    return tokenizer


def _buffer(size: int) -> np.ndarray:
    """Memory that jax copies on a CPU too. It would use a buffer in place that begins at a multiple of 64 bytes, and
    `may_alias=False` does not prevent that (jax 0.12)."""
    memory = np.empty(size + 128, np.uint8)
    return memory[(32 - memory.ctypes.data) % 64 :]


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize
