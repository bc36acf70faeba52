"""A model as one GGUF file, for llama.cpp and ollama. Written by the package `gguf` (extra `gguf`)."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.interop.architectures import ERNIE, GRANITE, Architecture, ExportDtype, multipliers
from moe_jax.interop.huggingface import norm_eps, trunk, written
from moe_jax.interop.source import ExportSource, balance_bias, embedding, experts
from moe_jax.interop.tokenizers import jinja, merges, separator_text, spelled

INTERLEAVED = ("llama", "granitemoe", "ernie4_5-moe")
"""Architectures that rotate the pairs (2i, 2i + 1) of a head."""
TRUNK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
"""The name of a part of a layer in transformers -> in GGUF."""


# The vocabulary of a tokenizer as GGUF holds it: words, their kinds, merges, and the rule that cuts text into words
#
# llama.cpp does not read a rule. It has its own code for the rules of known models, by name. So an imported tokenizer
# is written only if its rule is one of those in `RULES`.


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens in GGUF. A user-defined token is found in a text before the text is cut."""
_GPT2 = {"type": "ByteLevel", "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {"type": "ByteLevel", "use_regex": False}]


RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "qwen2": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
}
"""llama.cpp's name of a rule -> the parts of the pre-tokenizer that cut a text so."""


class GgufVocabulary(NamedTuple):
    """All that llama.cpp asks of a tokenizer."""

    words: list[str]
    """The word of each id."""
    kinds: list[int]
    merges: list[str]
    rule: str


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> GgufVocabulary:
    """The vocabulary of a model that knows `size` ids: an id that the tokenizer does not use has a word too. Raises
    UserError if llama.cpp has no name for the rule."""
    if tokenizer.kind == "hf":
        values = json.loads(tokenizer.to_dict()["file"])
        words = {i: word for word, i in values["model"]["vocab"].items()}
        kinds = dict.fromkeys(words, NORMAL)
        for token in values.get("added_tokens") or []:
            words[token["id"]] = token["content"]
            kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
        pairs, rule = values["model"].get("merges") or [], _rule(values.get("pre_tokenizer"))
    else:
        words = dict(enumerate(spelled(tokenizer)))
        kinds = dict.fromkeys(words, NORMAL) | {tokenizer.separator_id: CONTROL}
        pairs, rule = merges(tokenizer), "gpt-2"
    return GgufVocabulary(
        [words.get(i, f"<|unused_{i}|>") for i in range(size)],
        [kinds.get(i, CONTROL) for i in range(size)],
        [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs] or [NO_MERGE],
        rule,
    )


def _rule(pre_tokenizer: dict[str, Any] | None) -> str:
    one = pre_tokenizer or {}
    # A file of an old version leaves `use_regex` out, which is true then.
    usual, ignored = {"ByteLevel": {"use_regex": True}}, ("trim_offsets", "add_prefix_space")
    compared = [
        usual.get(part["type"], {}) | {name: value for name, value in part.items() if name not in ignored}
        for part in one.get("pretokenizers", [one] if one else [])
    ]
    for rule, known in RULES.items():
        if compared == known:
            return rule
    raise UserError(
        "--to gguf: llama.cpp has no name for the rule by which the imported tokenizer cuts text into words; known are "
        f"those of {', '.join(RULES)}; export to hf"
    )


NO_MERGE = "\u0200 \u0200"
"""llama.cpp refuses a vocabulary without merges. These characters spell no byte, so this merge never happens."""


# The file


def check_installed() -> None:
    """Raise UserError if the package `gguf` is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "--to gguf: the package gguf is missing; run `uv run --extra gguf moe-jax export ...`"
        ) from None


def write_gguf(path: Path, source: ExportSource, architecture: Architecture, name: str, dtype: ExportDtype) -> None:
    """Write the model. Matrices have the `dtype`; vectors and routers stay float32.

    A row of q8_0 is cut into blocks of 32 entries: a matrix whose rows are no multiple of that stays float16.
    """
    import gguf

    assert architecture.gguf is not None  # `architecture_of` and its caller refuse the others
    vocabulary = gguf_vocabulary(source.tokenizer, source.config.model.vocab_size)
    writer = gguf.GGUFWriter(path, architecture.gguf)
    _write_shape(writer, source, architecture, name)
    _write_tokenizer(writer, vocabulary, source.tokenizer.separator_id)
    if source.tokenizer.template is not None:
        writer.add_chat_template(source.tokenizer.template.text)
    elif source.tuned:
        writer.add_chat_template(jinja(separator_text(source.tokenizer)))
    # The file begins with the shapes of all tensors. The tensors follow one by one, so that none stays in memory.
    for tensor, weight in tensors(source.hollow(), architecture):
        kind = _kind(tensor, weight, dtype)
        size = math.prod(gguf.quants.quant_shape_to_byte_shape(weight.shape, kind))
        writer.add_tensor_info(tensor, weight.shape, weight.dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, weight in tensors(source, architecture):
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(weight), _kind(tensor, weight, dtype)))
    writer.close()


def _kind(name: str, weight: np.ndarray, dtype: ExportDtype) -> Any:
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
    if model.shared_experts:
        writer.add_expert_shared_feed_forward_length(model.shared_experts * model.expert_hidden)
    if architecture == ERNIE:
        writer.add_expert_shared_count(model.shared_experts)
        writer.add_interleave_moe_layer_step(1)
        writer.add_leading_dense_block_count(0)
    if architecture == GRANITE:
        factors = multipliers(model)
        writer.add_embedding_scale(factors["embedding_multiplier"])
        writer.add_attention_scale(factors["attention_multiplier"])
        writer.add_residual_scale(factors["residual_multiplier"])
        writer.add_logit_scale(factors["logits_scaling"])


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
        for name, weight in written(source, trunk(model, layer), interleaved=architecture.gguf in INTERLEAVED):
            *_, part, kind = name.split(".")
            yield f"{at}.{TRUNK[part]}.{kind}", weight
        networks = experts(source, layer)
        names = ("ffn_gate", "ffn_up", "ffn_down")
        if model.dense != "none":
            yield from ((f"{at}.{name}.weight", weight[0]) for name, weight in zip(names, networks, strict=True))
            continue
        yield f"{at}.ffn_gate_inp.weight", source.array(f"blocks.{layer}.ffn.router").T
        yield from ((f"{at}.{name}_exps.weight", weight) for name, weight in zip(names, networks, strict=True))
        if architecture == ERNIE:
            yield f"{at}.exp_probs_b.bias", balance_bias(source, layer)
        if model.shared_experts:
            shared = experts(source, layer, "shared")
            yield from ((f"{at}.{n}_shexp.weight", w[0]) for n, w in zip(names, shared, strict=True))
        if model.shared_gate:
            yield f"{at}.ffn_gate_inp_shexp.weight", source.array(f"blocks.{layer}.ffn.shared_gate")
    yield "output_norm.weight", source.array("norm.scale")
    if not model.tied_head:
        yield "output.weight", source.array("head").T
    elif architecture.gguf == "qwen2moe":  # llama.cpp has no tied head for it
        yield "output.weight", embedding(source)
