"""The weights of a model in the conventions of other programs: a projection is [out, in], heads may be interleaved."""

from typing import NamedTuple

import numpy as np

from moe_jax.interop.source import ExportSource


class AttentionWeights(NamedTuple):
    """float32, out x in: query [H A, D], key and value [KV A, D], out [D, H A]. Rows are (head, entry)."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray


class ExpertWeights(NamedTuple):
    """float32: gate and up [E, F, D], down [E, D, F]."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


def attention(source: ExportSource, layer: int, interleaved: bool = False) -> AttentionWeights:
    """The projections of a layer. `interleaved`: the class rotates the pairs (2i, 2i + 1) of a head, ours (i, i + A/2);
    the rows of query and key change places, so that the same pairs are rotated."""
    model = source.config.model
    queries, keys = model.heads * model.head_width, model.key_value_heads * model.head_width
    query, key, value = np.split(source.block(layer, "attention.qkv").T, [queries, queries + keys])
    if interleaved:
        query, key = _interleave(query, model.heads), _interleave(key, model.key_value_heads)
    return AttentionWeights(query, key, value, np.ascontiguousarray(source.block(layer, "attention.out").T))


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    pairs = rows.reshape(heads, 2, -1, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def experts(source: ExportSource, layer: int, name: str = "ffn.experts") -> ExpertWeights:
    """The networks of a layer: `ffn.experts`, or `ffn.shared`. A dense baseline has one."""
    names = ("w_gate", "w_in", "w_out")
    return ExpertWeights(*(source.block(layer, f"{name}.{part}").swapaxes(1, 2) for part in names))


def embedding(source: ExportSource) -> np.ndarray:
    """float32 [V, D]. With an untied head, the factor of a scaled embedding is part of it."""
    model = source.config.model
    table = source.array("embedding")
    return table * np.float32(np.sqrt(model.width)) if model.scaled_embedding and not model.tied_head else table
