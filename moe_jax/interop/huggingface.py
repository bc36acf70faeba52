"""A model as transformers holds it: which tensor is which of our parameters, for both ways.

Tensors have the names of transformers 4, which transformers 5 fuses at load.
"""

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.interop.architectures import ERNIE, GPT2, GRANITE, GRANITE_SHARED, MIXTRAL, Architecture
from moe_jax.interop.pretrained_shape import PretrainedShape
from moe_jax.interop.source import ExportSource, balance_bias, embedding, experts

type Tensors = Iterator[tuple[str, np.ndarray]]
"""(name, float32 array), one at a time, so that the model is never in memory twice."""


# Which tensor is which part of our parameters
#
# A projection is stored there as [out, in], and here as [in, out]. Our query, key and value are one matrix, and our
# experts are one array. The classes of this table rotate the pairs (i, i + A/2) of a head, as we do; but for ERNIE,
# which is only exported.


EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
FUSED = ("mlp.experts.gate_up_proj", "block_sparse_moe.input_linear.weight")
"""Tensors of a layer in which all its experts lie: as transformers 5 holds them in memory, and as Granite names them
on disk."""


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
    factor: float = 1.0
    """By which its values are multiplied."""


type Table = dict[str, list[Piece]]
"""Our parameter, by its dotted name -> its pieces."""


def is_fused(names: Container[str]) -> bool:
    """Whether the experts of a layer are one tensor, in a folder with tensors of these names."""
    return any(f"model.layers.0.{name}" in names for name in FUSED)


def table(shape: PretrainedShape, fused: bool, copies: bool = False) -> Table:
    """The table of a model in a folder. With `copies`, the pieces of a dense network fill all experts of an upcycled
    model."""
    model, factor = shape.model, shape.multipliers.of
    entries: Table = {
        "embedding": [Piece(EMBEDDING, (model.vocab_size, model.width), transposed=False)],
        "norm.scale": [Piece(NORM, (model.width,), transposed=False)],
    }
    if not model.tied_head:
        entries["head"] = [Piece(EMBEDDING if shape.tied else HEAD, (model.vocab_size, model.width))]
    for layer in range(model.layers):
        block = _trunk(model, layer) | _ffn(model, layer, shape.architecture, fused, copies)
        entries |= {f"blocks.{layer}.{name}": pieces for name, pieces in block.items()}
    return {
        name: [piece._replace(factor=factor(name, piece.tensor)) for piece in pieces]
        for name, pieces in entries.items()
    }


def expected(table: Table) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every tensor of a table."""
    return {piece.tensor: piece.shape for pieces in table.values() for piece in pieces}


def _trunk(model: ModelConfig, layer: int) -> Table:
    """The norms and the attention of a layer."""
    at, vector = f"model.layers.{layer}", (model.width,)
    queries, keys = model.heads * model.head_width, model.key_value_heads * model.head_width
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    entries = {
        "attention_norm.scale": [Piece(f"{at}.input_layernorm.weight", vector, transposed=False)],
        "ffn_norm.scale": [Piece(f"{at}.post_attention_layernorm.weight", vector, transposed=False)],
        "attention.qkv": [
            Piece(
                f"{at}.self_attn.{name}_proj.weight",
                (end - begin, model.width),
                place=(slice(None), slice(begin, end)),
            )
            for name, (begin, end) in ends.items()
        ],
        "attention.out": [Piece(f"{at}.self_attn.o_proj.weight", (model.width, queries))],
    }
    if model.qkv_bias:
        entries["attention.qkv_bias"] = [
            Piece(f"{at}.self_attn.{name}_proj.bias", (end - begin,), transposed=False, place=slice(begin, end))
            for name, (begin, end) in ends.items()
        ]
    if model.qk_norm != "none":
        sizes = (queries, keys) if model.qk_norm == "full" else (model.head_width,) * 2
        for name, ours, size in zip("qk", ("query", "key"), sizes, strict=True):
            norm = Piece(f"{at}.self_attn.{name}_norm.weight", (size,), transposed=False)
            entries[f"attention.{ours}_norm.scale"] = [norm]
    return entries


def _ffn(
    model: ModelConfig, layer: int, architecture: Architecture, fused: bool = False, copies: bool = False
) -> Table:
    at, ours = f"model.layers.{layer}", ("w_gate", "w_in", "w_out")
    if model.dense != "none":
        place = slice(None) if copies else 0
        return {
            f"ffn.experts.{name}": [Piece(f"{at}.mlp.{theirs}_proj.weight", shape, place=place)]
            for name, theirs, shape in zip(
                ours, ("gate", "up", "down"), _network_shapes(model, model.dense_hidden), strict=True
            )
        }
    if architecture in (GRANITE, GRANITE_SHARED):
        return _granite(model, at)
    mixtral = architecture == MIXTRAL
    prefix = f"{at}.block_sparse_moe" if mixtral and not fused else f"{at}.mlp"
    entries = {"ffn.router": [Piece(f"{prefix}.gate.weight", (model.experts, model.width))]}
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    if fused:
        pair = f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"
        entries |= _fused("ffn.experts", pair, model.expert_hidden, model.width, model.experts)
    else:
        for name, theirs, shape in zip(ours, names, _network_shapes(model, model.expert_hidden), strict=True):
            entries[f"ffn.experts.{name}"] = [
                Piece(f"{prefix}.experts.{expert}.{theirs}.weight", shape, place=expert)
                for expert in range(model.experts)
            ]
    if model.shared_experts:
        shapes = _network_shapes(model, model.shared_experts * model.expert_hidden)
        shared = f"{prefix}.shared_expert{'' if model.shared_gate else 's'}"  # Qwen's is one, Ernie's are many
        for name, theirs, shape in zip(ours, names, shapes, strict=True):
            entries[f"ffn.shared.{name}"] = [Piece(f"{shared}.{theirs}.weight", shape, place=0)]
    if model.shared_gate:
        gate = Piece(f"{prefix}.shared_expert_gate.weight", (1, model.width), transposed=False, part=0)
        entries["ffn.shared_gate"] = [gate]
    return entries


def _granite(model: ModelConfig, at: str) -> Table:
    moe = f"{at}.block_sparse_moe"
    pair = f"{moe}.input_linear.weight", f"{moe}.output_linear.weight"
    entries = {"ffn.router": [Piece(f"{moe}.router.layer.weight", (model.experts, model.width))]}
    entries |= _fused("ffn.experts", pair, model.expert_hidden, model.width, model.experts)
    if model.shared_experts:
        pair = f"{at}.shared_mlp.input_linear.weight", f"{at}.shared_mlp.output_linear.weight"
        entries |= _fused("ffn.shared", pair, model.shared_experts * model.expert_hidden, model.width)
    return entries


def _network_shapes(model: ModelConfig, hidden: int) -> list[tuple[int, int]]:
    """Of the tensors of w_gate, w_in and w_out."""
    return [(hidden, model.width), (hidden, model.width), (model.width, hidden)]


def _fused(ours: str, names: tuple[str, str], hidden: int, width: int, *experts: int) -> Table:
    """Networks as two tensors, the gate before the other input projection: of all experts, or of a single network."""
    both, place = (*experts, 2 * hidden, width), ... if experts else 0
    parts = {"w_gate": slice(hidden), "w_in": slice(hidden, None)}
    entries = {
        f"{ours}.{name}": [Piece(names[0], both, place=place, part=(..., part, slice(None)))]
        for name, part in parts.items()
    }
    return entries | {f"{ours}.w_out": [Piece(names[1], (*experts, width, hidden), place=place)]}


# The tensors of an export


def tensors(source: ExportSource, architecture: Architecture) -> Tensors:
    """All tensors of the model."""
    if architecture == GPT2:
        yield from _gpt2_tensors(source)
        return
    model = source.config.model
    yield EMBEDDING, embedding(source)
    for layer in range(model.layers):
        yield from trunk_tensors(source, layer, interleaved=architecture == ERNIE)
        if architecture == GRANITE:
            yield from _granite_experts(source, layer)
        else:
            yield from _pieces(source, layer, _ffn(model, layer, architecture))
        if architecture == ERNIE:
            bias = balance_bias(source, layer)
            yield f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias", bias[None]
    yield NORM, source.array("norm.scale")
    if not model.tied_head:
        yield HEAD, source.array("head").T


def trunk_tensors(source: ExportSource, layer: int, interleaved: bool) -> Tensors:
    """The norms and the attention of a layer. `interleaved`: the class rotates the pairs (2i, 2i + 1) of a head, ours
    (i, i + A/2); the rows of query and key change places, so that the same pairs are rotated."""
    model = source.config.model
    for name, tensor in _pieces(source, layer, _trunk(model, layer)):
        if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = tensor.reshape(-1, 2, model.head_width // 2, model.width)
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        yield name, tensor


def _pieces(source: ExportSource, layer: int, entries: Table) -> Tensors:
    for name, pieces in entries.items():
        ours = source.block(layer, name)
        for piece in pieces:
            tensor = ours[piece.place]
            yield piece.tensor, tensor.swapaxes(-1, -2) if piece.transposed else tensor.reshape(piece.shape)


def _granite_experts(source: ExportSource, layer: int) -> Tensors:
    at, (gate, up, down) = f"model.layers.{layer}.block_sparse_moe", experts(source, layer)
    yield f"{at}.router.layer.weight", source.block(layer, "ffn.router").T
    yield f"{at}.input_linear.weight", np.concatenate([gate, up], 1)
    yield f"{at}.output_linear.weight", down


def _gpt2_tensors(source: ExportSource) -> Tensors:
    """GPT-2 stores projections [in, out], as we do, and has biases in its feed-forward network; ours are zeros."""
    model = source.config.model
    yield "transformer.wte.weight", source.array("embedding")
    yield "transformer.wpe.weight", source.array("position")
    for layer in range(model.layers):
        at = f"transformer.h.{layer}"
        for name, ours in (("ln_1", "attention_norm"), ("ln_2", "ffn_norm")):
            yield f"{at}.{name}.weight", source.block(layer, f"{ours}.scale")
            yield f"{at}.{name}.bias", source.block(layer, f"{ours}.bias")
        for name, ours in (("c_attn", "qkv"), ("c_proj", "out")):
            yield f"{at}.attn.{name}.weight", source.block(layer, f"attention.{ours}")
            yield f"{at}.attn.{name}.bias", source.block(layer, f"attention.{ours}_bias")
        for name, ours in (("c_fc", "w_in"), ("c_proj", "w_out")):
            weight = source.block(layer, f"ffn.experts.{ours}")[0]
            yield f"{at}.mlp.{name}.weight", weight
            yield f"{at}.mlp.{name}.bias", np.zeros(weight.shape[1], np.float32)
    yield "transformer.ln_f.weight", source.array("norm.scale")
    yield "transformer.ln_f.bias", source.array("norm.bias")
    if not model.tied_head:
        yield "lm_head.weight", source.array("head").T
