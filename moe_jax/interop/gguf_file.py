"""A model as one GGUF file, for llama.cpp and ollama. Written by the package `gguf` (extra `gguf`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_jax.config import UserError
from moe_jax.interop.architectures import ERNIE, GRANITE, Architecture
from moe_jax.interop.chat_template import jinja
from moe_jax.interop.gguf_vocabulary import GgufVocabulary, gguf_vocabulary
from moe_jax.interop.huggingface import norm_eps
from moe_jax.interop.layers import attention, embedding, experts
from moe_jax.interop.source import ExportSource
from moe_jax.interop.tokenizers import separator_text

GgufType = Literal["float32", "bfloat16", "float16", "q8_0"]

INTERLEAVED = ("llama", "granitemoe", "ernie4_5-moe")
"""Architectures that rotate the pairs (2i, 2i + 1) of a head."""


def check_installed() -> None:
    """Raise UserError if the package `gguf` is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "--to gguf: the package gguf is missing; run `uv run --extra gguf python -m moe_jax export ...`"
        ) from None


def write_gguf(path: Path, source: ExportSource, architecture: Architecture, name: str, dtype: GgufType) -> None:
    """Write the model. Matrices have the `dtype`; vectors and routers stay float32.

    A row of q8_0 is cut into blocks of 32 entries: a matrix whose rows are no multiple of that stays float16.
    """
    import gguf

    assert architecture.gguf is not None  # `architecture_of` and its caller refuse the others
    vocabulary = gguf_vocabulary(source.tokenizer, source.config.model.vocab_size)
    writer = gguf.GGUFWriter(path, architecture.gguf)
    _write_shape(writer, source, architecture, name)
    _write_tokenizer(writer, vocabulary, source.tokenizer.separator_id)
    if source.tuned:
        writer.add_chat_template(jinja(separator_text(source.tokenizer)))
    for tensor, weight in tensors(source, architecture):
        kind = _kind(tensor, weight, dtype)
        writer.add_tensor(tensor, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(name: str, weight: np.ndarray, dtype: GgufType) -> Any:
    from gguf import GGMLQuantizationType as Kind

    if weight.ndim == 1 or dtype == "float32" or "ffn_gate_inp" in name:
        return Kind.F32
    if dtype == "q8_0":
        return Kind.Q8_0 if weight.shape[-1] % 32 == 0 else Kind.F16
    return Kind.BF16 if dtype == "bfloat16" else Kind.F16


def _write_shape(writer: Any, source: ExportSource, architecture: Architecture, name: str) -> None:
    model = source.config.model
    writer.add_name(name)
    writer.add_context_length(model.seq_len)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.layers)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.key_value_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(norm_eps(model))
    writer.add_vocab_size(model.vocab_size)
    if model.dense != "none":
        writer.add_feed_forward_length(model.dense_hidden)
        return
    writer.add_feed_forward_length(model.expert_hidden)
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(model.routing.top_k)
    if architecture.gguf != "llama":
        writer.add_expert_feed_forward_length(model.expert_hidden)
    if architecture == ERNIE:
        writer.add_expert_shared_count(model.shared_experts)
        writer.add_expert_shared_feed_forward_length(model.shared_experts * model.expert_hidden)
        writer.add_interleave_moe_layer_step(1)
        writer.add_leading_dense_block_count(0)
    if architecture == GRANITE:
        writer.add_embedding_scale(float(np.sqrt(model.width)))
        writer.add_attention_scale(float(1 / np.sqrt(model.head_width)))
        writer.add_residual_scale(1.0)
        writer.add_logit_scale(1.0)


def _write_tokenizer(writer: Any, vocabulary: GgufVocabulary, separator: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.words)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(separator)
    writer.add_eos_token_id(separator)
    writer.add_add_bos_token(True)


def tensors(source: ExportSource, architecture: Architecture) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 array) of all tensors."""
    model = source.config.model
    yield "token_embd.weight", embedding(source)
    for layer in range(model.layers):
        at = f"blk.{layer}"
        yield f"{at}.attn_norm.weight", source.block(layer, "attention_norm.scale")
        yield f"{at}.ffn_norm.weight", source.block(layer, "ffn_norm.scale")
        found = attention(source, layer, interleaved=architecture.gguf in INTERLEAVED)
        for name, weight in zip(("q", "k", "v", "output"), found, strict=True):
            yield f"{at}.attn_{name}.weight", weight
        if model.qk_norm != "none":
            yield f"{at}.attn_q_norm.weight", source.block(layer, "attention.query_norm.scale")
            yield f"{at}.attn_k_norm.weight", source.block(layer, "attention.key_norm.scale")
        networks = experts(source, layer)
        names = ("ffn_gate", "ffn_up", "ffn_down")
        if model.dense != "none":
            yield from ((f"{at}.{name}.weight", weight[0]) for name, weight in zip(names, networks, strict=True))
            continue
        yield f"{at}.ffn_gate_inp.weight", source.block(layer, "ffn.router").T
        yield from ((f"{at}.{name}_exps.weight", weight) for name, weight in zip(names, networks, strict=True))
        if architecture == ERNIE:
            bias = model.routing.balancing == "bias"
            yield (
                f"{at}.exp_probs_b.bias",
                source.block(layer, "ffn.balance_bias") if bias else np.zeros(model.experts, np.float32),
            )
            if model.shared_experts:
                shared = experts(source, layer, "ffn.shared")
                yield from ((f"{at}.{n}_shexp.weight", w[0]) for n, w in zip(names, shared, strict=True))
    yield "output_norm.weight", source.array("norm.scale")
    if not model.tied_head:
        yield "output.weight", source.array("head").T
