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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from moe_jax.config import ModelConfig, UserError
from moe_jax.data.tokenizers import Tokenizer, imported_tokenizer
from moe_jax.interop.architectures import MIXTRAL
from moe_jax.interop.pretrained_shape import PretrainedShape, read_file, read_shape
from moe_jax.interop.weight_files import WeightFiles
from moe_jax.model.transformer import Params
from moe_jax.system.files import MAX_JSON_BYTES

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


# Which tensor of a Hugging Face model is which part of our parameters
#
# A projection is stored there as [out, in], and here as [in, out]. Our query, key and value are one matrix, and our
# experts are one array. The classes of this table rotate the pairs (i, i + A/2) of a head, as we do.


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
"""A tensor that is there if the experts of a layer are one tensor, as transformers 5 holds them in memory."""


class Piece(NamedTuple):
    """A tensor, or a part of it, and its place in one of our parameters."""

    tensor: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    transposed: bool = True
    """Whether its last two axes change places."""
    place: Any = ...
    """Index into our parameter. A piece is repeated where the place is larger."""
    part: Any = ...
    """Index into the tensor."""


type Table = dict[str, list[Piece]]
"""Our parameter, by its dotted name -> its pieces."""


def table(model: ModelConfig, mixtral: bool, fused: bool, copies: bool = False) -> Table:
    """The table of a model. `mixtral` names the experts as Mixtral does. With `copies`, the pieces of a dense network
    fill all experts of an upcycled model."""
    vector = (model.width,)
    entries: Table = {
        "embedding": [Piece(EMBEDDING, (model.vocab_size, model.width), transposed=False)],
        "norm.scale": [Piece("model.norm.weight", vector, transposed=False)],
    }
    if not model.tied_head:
        entries["head"] = [Piece(HEAD, (model.vocab_size, model.width))]
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        block = {
            "attention_norm.scale": [Piece(f"{at}.input_layernorm.weight", vector, transposed=False)],
            "ffn_norm.scale": [Piece(f"{at}.post_attention_layernorm.weight", vector, transposed=False)],
            **_attention(model, f"{at}.self_attn"),
            **_ffn(model, at, mixtral, fused, copies),
        }
        entries |= {f"blocks.{layer}.{name}": pieces for name, pieces in block.items()}
    return entries


def expected(table: Table) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every tensor of a table."""
    return {piece.tensor: piece.shape for pieces in table.values() for piece in pieces}


def _attention(model: ModelConfig, at: str) -> Table:
    queries, keys = model.heads * model.head_width, model.key_value_heads * model.head_width
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    entries = {
        "attention.qkv": [
            Piece(f"{at}.{name}_proj.weight", (end - begin, model.width), place=(slice(None), slice(begin, end)))
            for name, (begin, end) in ends.items()
        ],
        "attention.out": [Piece(f"{at}.o_proj.weight", (model.width, queries))],
    }
    if model.qk_norm != "none":
        sizes = (queries, keys) if model.qk_norm == "full" else (model.head_width,) * 2
        for name, ours, size in zip("qk", ("query", "key"), sizes, strict=True):
            entries[f"attention.{ours}_norm.scale"] = [Piece(f"{at}.{name}_norm.weight", (size,), transposed=False)]
    return entries


def _ffn(model: ModelConfig, at: str, mixtral: bool, fused: bool, copies: bool) -> Table:
    ours = ("w_gate", "w_in", "w_out")
    if model.dense != "none":
        width, hidden = model.width, model.dense_hidden
        shapes = ((hidden, width), (hidden, width), (width, hidden))
        place = slice(None) if copies else 0
        return {
            f"ffn.experts.{name}": [Piece(f"{at}.mlp.{theirs}_proj.weight", shape, place=place)]
            for name, theirs, shape in zip(ours, ("gate", "up", "down"), shapes, strict=True)
        }
    prefix = f"{at}.block_sparse_moe" if mixtral and not fused else f"{at}.mlp"
    router = {"ffn.router": [Piece(f"{prefix}.gate.weight", (model.experts, model.width))]}
    if fused:
        return router | _fused(model, prefix)
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    return router | {
        f"ffn.experts.{name}": list(_per_expert(model, f"{prefix}.experts", theirs, name == "w_out"))
        for name, theirs in zip(ours, names, strict=True)
    }


def _per_expert(model: ModelConfig, at: str, name: str, output: bool) -> Iterator[Piece]:
    shape = (model.width, model.expert_hidden) if output else (model.expert_hidden, model.width)
    for expert in range(model.experts):
        yield Piece(f"{at}.{expert}.{name}.weight", shape, place=expert)


def _fused(model: ModelConfig, prefix: str) -> Table:
    """The experts of a layer as two tensors, the gate before the other input projection."""
    experts, width, hidden = model.experts, model.width, model.expert_hidden
    both, name = (experts, 2 * hidden, width), f"{prefix}.experts.gate_up_proj"
    return {
        "ffn.experts.w_gate": [Piece(name, both, part=(slice(None), slice(hidden)))],
        "ffn.experts.w_in": [Piece(name, both, part=(slice(None), slice(hidden, None)))],
        "ffn.experts.w_out": [Piece(f"{prefix}.experts.down_proj", (experts, width, hidden))],
    }


# The folder, opened


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
        opened.weights.check(expected(opened._table()), {HEAD} if shape.model.tied_head else set())
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
        if self.shape.model.tied_head and HEAD in self.weights.tensors:
            self._check_tied()
        parts = [self.shape.text.hex(), self.tokenizer.digest, sorted(digests.items())]
        return filled, xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def _table(self, copies: bool = False) -> Table:
        mixtral = self.shape.architecture == MIXTRAL
        return table(self.shape.model, mixtral, FUSED in self.weights.tensors, copies)

    def _parameter(
        self, leaf: jax.ShapeDtypeStruct, pieces: list[Piece], scratch: np.ndarray, digests: dict[str, str]
    ) -> jax.Array:
        made = scratch[: _bytes(leaf)].view(leaf.dtype).reshape(leaf.shape)
        for piece in pieces:
            source = self.weights.tensors[piece.tensor].map()
            if piece.tensor not in digests:
                digests[piece.tensor] = xxhash.xxh3_128_hexdigest(source.view(np.uint8))
            part = source[piece.part]
            target = made[piece.place]
            with np.errstate(over="ignore"):  # a value that is too large for the dtype is named below
                target[...] = part.swapaxes(-1, -2) if piece.transposed else part
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
        embedding, head = (self.weights.tensors[name].map() for name in (EMBEDDING, HEAD))
        if not np.array_equal(embedding, head):
            raise UserError(
                f"{self.weights.folder}: tensor {HEAD} is not the embedding, and config.json says "
                "tie_word_embeddings; set that to false if the tensor is right"
            )


def _tokenizer(folder: Path, shape: PretrainedShape) -> Tokenizer:
    """The tokenizer of a folder, whose ids the model must know."""
    try:
        file = read_file(folder, TOKENIZER, MAX_JSON_BYTES // 2).decode()
    except FileNotFoundError:
        raise UserError(f"{folder}: has no {TOKENIZER}; open its tokenizer in transformers and save it again") from None
    except OSError as error:
        raise UserError(f"{folder / TOKENIZER}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{folder / TOKENIZER}: is not UTF-8; download the file again") from None
    try:
        settings = read_file(folder, TOKENIZER_CONFIG, 1 << 22).decode()
    except (OSError, UnicodeDecodeError):
        settings = ""
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
