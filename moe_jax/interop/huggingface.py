"""A model as transformers holds it: which tensor is which of our parameters, for both ways; and its config.json.

Tensors have the names of transformers 4, which transformers 5 fuses at load.
"""

import json
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.interop.architectures import (
    ERNIE,
    GPT2,
    GRANITE,
    GRANITE_SHARED,
    LAYOUTS,
    MIXTRAL,
    Architecture,
    multipliers,
)
from moe_jax.interop.source import ExportSource, balance_bias, embedding

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


type Table = dict[str, list[Piece]]
"""Our parameter, by its dotted name -> its pieces."""


def is_fused(names: Container[str]) -> bool:
    """Whether the experts of a layer are one tensor, in a folder with tensors of these names."""
    return any(f"model.layers.0.{name}" in names for name in FUSED)


def table(model: ModelConfig, architecture: Architecture, fused: bool = False, copies: bool = False) -> Table:
    """The table of a model. With `copies`, the pieces of a dense network fill all experts of an upcycled model."""
    entries: Table = {
        "embedding": [Piece(EMBEDDING, (model.vocab_size, model.width), transposed=False)],
        "norm.scale": [Piece(NORM, (model.width,), transposed=False)],
    }
    if not model.tied_head:
        entries["head"] = [Piece(HEAD, (model.vocab_size, model.width))]
    for layer in range(model.layers):
        ffn = _ffn(model, layer, architecture, fused, copies)
        entries |= trunk(model, layer) | {f"blocks.{layer}.ffn.{name}": pieces for name, pieces in ffn.items()}
    return entries


def expected(table: Table) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every tensor of a table."""
    return {piece.tensor: piece.shape for pieces in table.values() for piece in pieces}


def trunk(model: ModelConfig, layer: int) -> Table:
    """The norms and the attention of a layer."""
    ours, at, vector = f"blocks.{layer}", f"model.layers.{layer}", (model.width,)
    queries, keys = model.heads * model.head_width, model.key_value_heads * model.head_width
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    entries = {
        f"{ours}.attention_norm.scale": [Piece(f"{at}.input_layernorm.weight", vector, transposed=False)],
        f"{ours}.ffn_norm.scale": [Piece(f"{at}.post_attention_layernorm.weight", vector, transposed=False)],
        f"{ours}.attention.qkv": [
            Piece(
                f"{at}.self_attn.{name}_proj.weight",
                (end - begin, model.width),
                place=(slice(None), slice(begin, end)),
            )
            for name, (begin, end) in ends.items()
        ],
        f"{ours}.attention.out": [Piece(f"{at}.self_attn.o_proj.weight", (model.width, queries))],
    }
    if model.qkv_bias:
        entries[f"{ours}.attention.qkv_bias"] = [
            Piece(f"{at}.self_attn.{name}_proj.bias", (end - begin,), transposed=False, place=slice(begin, end))
            for name, (begin, end) in ends.items()
        ]
    if model.qk_norm != "none":
        sizes = (queries, keys) if model.qk_norm == "full" else (model.head_width,) * 2
        for name, size in zip(("query", "key"), sizes, strict=True):
            norm = Piece(f"{at}.self_attn.{name[0]}_norm.weight", (size,), transposed=False)
            entries[f"{ours}.attention.{name}_norm.scale"] = [norm]
    return entries


def _ffn(model: ModelConfig, layer: int, architecture: Architecture, fused: bool, copies: bool) -> Table:
    """The feed-forward network of a layer, by the names of its parameters in ours."""
    at, ours = f"model.layers.{layer}", ("w_gate", "w_in", "w_out")
    if model.dense != "none":
        place = slice(None) if copies else 0
        return {
            f"experts.{name}": [Piece(f"{at}.mlp.{theirs}_proj.weight", shape, place=place)]
            for name, theirs, shape in zip(
                ours, ("gate", "up", "down"), _network_shapes(model, model.dense_hidden), strict=True
            )
        }
    if architecture in (GRANITE, GRANITE_SHARED):
        return _granite(model, at)
    mixtral = architecture == MIXTRAL
    prefix = f"{at}.block_sparse_moe" if mixtral and not fused else f"{at}.mlp"
    entries = {"router": [Piece(f"{prefix}.gate.weight", (model.experts, model.width))]}
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    if fused:
        pair = f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"
        entries |= _fused("experts", pair, model.expert_hidden, model.width, model.experts)
    else:
        for name, theirs, shape in zip(ours, names, _network_shapes(model, model.expert_hidden), strict=True):
            entries[f"experts.{name}"] = [
                Piece(f"{prefix}.experts.{expert}.{theirs}.weight", shape, place=expert)
                for expert in range(model.experts)
            ]
    if model.shared_experts:
        shapes = _network_shapes(model, model.shared_experts * model.expert_hidden)
        shared = f"{prefix}.shared_expert{'' if model.shared_gate else 's'}"  # Qwen's is one, Ernie's are many
        for name, theirs, shape in zip(ours, names, shapes, strict=True):
            entries[f"shared.{name}"] = [Piece(f"{shared}.{theirs}.weight", shape, place=0)]
    if model.shared_gate:
        gate = Piece(f"{prefix}.shared_expert_gate.weight", (1, model.width), transposed=False, part=0)
        entries["shared_gate"] = [gate]
    return entries


def _granite(model: ModelConfig, at: str) -> Table:
    moe = f"{at}.block_sparse_moe"
    pair = f"{moe}.input_linear.weight", f"{moe}.output_linear.weight"
    entries = {"router": [Piece(f"{moe}.router.layer.weight", (model.experts, model.width))]}
    entries |= _fused("experts", pair, model.expert_hidden, model.width, model.experts)
    if model.shared_experts:
        pair = f"{at}.shared_mlp.input_linear.weight", f"{at}.shared_mlp.output_linear.weight"
        entries |= _fused("shared", pair, model.shared_experts * model.expert_hidden, model.width)
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


# An export


def tensors(source: ExportSource, architecture: Architecture) -> Tensors:
    """All tensors of the model."""
    if architecture == GPT2:
        yield from _gpt2_tensors(source)
        return
    model = source.config.model
    yield from written(source, table(model, architecture), interleaved=architecture == ERNIE)
    if architecture == ERNIE:
        for layer in range(model.layers):
            name = f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"
            yield name, balance_bias(source, layer)[None]


def written(source: ExportSource, entries: Table, interleaved: bool) -> Tensors:
    """The tensors of a table. `interleaved`: the class rotates the pairs (2i, 2i + 1) of a head, ours (i, i + A/2); the
    rows of query and key change places, so that the same pairs are rotated."""
    model = source.config.model
    found: dict[str, list[tuple[str, Piece]]] = {}
    for name, pieces in entries.items():
        for piece in pieces:
            found.setdefault(piece.tensor, []).append((name, piece))
    for tensor, parts in found.items():
        arrays = [
            embedding(source) if name == "embedding" else source.array(name, piece.place) for name, piece in parts
        ]
        _, piece = parts[0]
        arrays = [array.swapaxes(-1, -2) if piece.transposed else array for array in arrays]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -2)
        if interleaved and tensor.endswith(("q_proj.weight", "k_proj.weight")):
            whole = whole.reshape(-1, 2, model.head_width // 2, model.width).swapaxes(1, 2)
        yield tensor, whole.reshape(piece.shape)


def _gpt2_tensors(source: ExportSource) -> Tensors:
    """GPT-2 stores projections [in, out], as we do, and has biases in its feed-forward network; ours are zeros."""
    model = source.config.model
    yield "transformer.wte.weight", source.array("embedding")
    yield "transformer.wpe.weight", source.array("position")
    for layer in range(model.layers):
        at = f"transformer.h.{layer}"
        for name, ours in (("ln_1", "attention_norm"), ("ln_2", "ffn_norm")):
            yield f"{at}.{name}.weight", source.array(f"blocks.{layer}.{ours}.scale")
            yield f"{at}.{name}.bias", source.array(f"blocks.{layer}.{ours}.bias")
        for name, ours in (("c_attn", "qkv"), ("c_proj", "out")):
            yield f"{at}.attn.{name}.weight", source.array(f"blocks.{layer}.attention.{ours}")
            yield f"{at}.attn.{name}.bias", source.array(f"blocks.{layer}.attention.{ours}_bias")
        for name, ours in (("c_fc", "w_in"), ("c_proj", "w_out")):
            weight = source.array(f"blocks.{layer}.ffn.experts.{ours}")[0]
            yield f"{at}.mlp.{name}.weight", weight
            yield f"{at}.mlp.{name}.bias", np.zeros(weight.shape[1], np.float32)
    yield "transformer.ln_f.weight", source.array("norm.scale")
    yield "transformer.ln_f.bias", source.array("norm.bias")
    if not model.tied_head:
        yield "lm_head.weight", source.array("head").T


def norm_eps(model: ModelConfig) -> float:
    """What is added in a normalisation (`model/layers.py`). The defaults of the classes are others."""
    return model.norm_eps or (1e-5 if model.norm == "layernorm" else 1e-6)


def config_json(source: ExportSource, architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    model, separator = source.config.model, source.tokenizer.separator_id
    shared = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "dtype": dtype,
        "torch_dtype": dtype,
        "tie_word_embeddings": model.tied_head,
    }
    if architecture == GPT2:
        return shared | {
            "n_positions": model.seq_len,
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": model.dense_hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": norm_eps(model),
        }
    scaling = json.loads(model.rope_scaling or "{}")
    shared |= {
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": norm_eps(model),
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta} | scaling,
        "rope_scaling": scaling or None,
        "attention_bias": False,
        "intermediate_size": model.expert_hidden if model.dense == "none" else model.dense_hidden,
        "use_cache": True,
    }
    return shared if model.dense != "none" else shared | _expert_config(model, architecture)


def _expert_config(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    top_k, shared = model.routing.top_k, model.shared_experts * model.expert_hidden
    if architecture == ERNIE:
        return {
            "moe_num_experts": model.experts,
            "moe_k": top_k,
            "moe_intermediate_size": model.expert_hidden,
            "moe_num_shared_experts": model.shared_experts,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": model.layers - 1,
            "moe_layer_interval": 1,
            "use_bias": False,
        }
    layout = LAYOUTS[architecture.model_type]
    config: dict[str, Any] = {
        layout.experts: model.experts,
        layout.hidden: model.expert_hidden,
        "num_experts_per_tok": top_k,
    }
    if layout.renormalise is None:
        config["sliding_window"] = None
    else:
        renormalised = top_k > 1 and model.routing.renormalise_gates
        config |= {"norm_topk_prob": renormalised, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if layout.shared:
        config[layout.shared] = shared
    if layout.gated:
        config |= {"qkv_bias": model.qkv_bias, "use_sliding_window": False}
    if layout.multipliers:
        config |= multipliers(model)
    return config
