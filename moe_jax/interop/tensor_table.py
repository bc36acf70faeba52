"""Which tensor of a Hugging Face model is which part of our parameters.

A projection is stored there as [out, in], and here as [in, out]. Our query, key and value are one matrix, and our
experts are one array. The classes of this table rotate the pairs (i, i + A/2) of a head, as we do.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_jax.config import ModelConfig

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
    found: Table = {
        "embedding": [Piece(EMBEDDING, (model.vocab_size, model.width), transposed=False)],
        "norm.scale": [Piece("model.norm.weight", vector, transposed=False)],
    }
    if not model.tied_head:
        found["head"] = [Piece(HEAD, (model.vocab_size, model.width))]
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        block = {
            "attention_norm.scale": [Piece(f"{at}.input_layernorm.weight", vector, transposed=False)],
            "ffn_norm.scale": [Piece(f"{at}.post_attention_layernorm.weight", vector, transposed=False)],
            **_attention(model, f"{at}.self_attn"),
            **_ffn(model, at, mixtral, fused, copies),
        }
        found |= {f"blocks.{layer}.{name}": pieces for name, pieces in block.items()}
    return found


def expected(table: Table) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every tensor of a table."""
    return {piece.tensor: piece.shape for pieces in table.values() for piece in pieces}


def _attention(model: ModelConfig, at: str) -> Table:
    queries, keys = model.heads * model.head_width, model.key_value_heads * model.head_width
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    found = {
        "attention.qkv": [
            Piece(f"{at}.{name}_proj.weight", (end - begin, model.width), place=(slice(None), slice(begin, end)))
            for name, (begin, end) in ends.items()
        ],
        "attention.out": [Piece(f"{at}.o_proj.weight", (model.width, queries))],
    }
    if model.qk_norm != "none":
        sizes = (queries, keys) if model.qk_norm == "full" else (model.head_width,) * 2
        for name, ours, size in zip("qk", ("query", "key"), sizes, strict=True):
            found[f"attention.{ours}_norm.scale"] = [Piece(f"{at}.{name}_norm.weight", (size,), transposed=False)]
    return found


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
    room = f"{at}.block_sparse_moe" if mixtral and not fused else f"{at}.mlp"
    router = {"ffn.router": [Piece(f"{room}.gate.weight", (model.experts, model.width))]}
    if fused:
        return router | _fused(model, room)
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    return router | {
        f"ffn.experts.{name}": list(_per_expert(model, f"{room}.experts", theirs, name == "w_out"))
        for name, theirs in zip(ours, names, strict=True)
    }


def _per_expert(model: ModelConfig, at: str, name: str, output: bool) -> Iterator[Piece]:
    shape = (model.width, model.expert_hidden) if output else (model.expert_hidden, model.width)
    for expert in range(model.experts):
        yield Piece(f"{at}.{expert}.{name}.weight", shape, place=expert)


def _fused(model: ModelConfig, room: str) -> Table:
    """The experts of a layer as two tensors, the gate before the other input projection."""
    experts, width, hidden = model.experts, model.width, model.expert_hidden
    both, name = (experts, 2 * hidden, width), f"{room}.experts.gate_up_proj"
    return {
        "ffn.experts.w_gate": [Piece(name, both, part=(slice(None), slice(hidden)))],
        "ffn.experts.w_in": [Piece(name, both, part=(slice(None), slice(hidden, None)))],
        "ffn.experts.w_out": [Piece(f"{room}.experts.down_proj", (experts, width, hidden))],
    }
