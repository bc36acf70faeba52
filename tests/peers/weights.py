"""A model's parameters under the names of Hugging Face transformers: Mixtral and Qwen3-MoE, and GPT-2 for the dense
baseline. Public checkpoints have these layouts."""

from collections.abc import Iterator
from typing import Any

import numpy as np


def llama_like(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values for `MixtralForCausalLM` and `Qwen3MoeForCausalLM`. A linear layer holds [out, in]."""
    yield "model.embed_tokens.weight", _array(params["embedding"])
    yield "model.norm.weight", _array(params["norm"]["scale"])
    yield "lm_head.weight", _array(params["head"]).T
    for n, block in params["blocks"].items():
        prefix, attention, ffn = f"model.layers.{n}", block["attention"], block["ffn"]
        yield f"{prefix}.input_layernorm.weight", _array(block["attention_norm"]["scale"])
        yield f"{prefix}.post_attention_layernorm.weight", _array(block["ffn_norm"]["scale"])
        for letter, matrix in zip("qkv", np.split(_array(attention["qkv"]), 3, axis=1), strict=True):
            yield f"{prefix}.self_attn.{letter}_proj.weight", matrix.T
        yield f"{prefix}.self_attn.o_proj.weight", _array(attention["out"]).T
        for letter, name in (("q", "query_norm"), ("k", "key_norm")):
            if name in attention:
                yield f"{prefix}.self_attn.{letter}_norm.weight", _array(attention[name]["scale"])
        experts = {name: _array(value).swapaxes(1, 2) for name, value in ffn["experts"].items()}
        yield f"{prefix}.mlp.gate.weight", _array(ffn["router"]).T
        yield f"{prefix}.mlp.experts.gate_up_proj", np.concatenate([experts["w_gate"], experts["w_in"]], axis=1)
        yield f"{prefix}.mlp.experts.down_proj", experts["w_out"]


def gpt2(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values for `GPT2LMHeadModel`, whose linear layers hold [in, out]. Our feed-forward network has no
    biases, so theirs are zeros."""
    yield "transformer.wte.weight", _array(params["embedding"])
    yield "transformer.wpe.weight", _array(params["position"])
    yield "lm_head.weight", _array(params["head"]).T
    yield from _norm("transformer.ln_f", params["norm"])
    for n, block in params["blocks"].items():
        prefix, attention, experts = f"transformer.h.{n}", block["attention"], block["ffn"]["experts"]
        yield from _norm(f"{prefix}.ln_1", block["attention_norm"])
        yield from _norm(f"{prefix}.ln_2", block["ffn_norm"])
        for theirs, ours in (("c_attn", "qkv"), ("c_proj", "out")):
            yield f"{prefix}.attn.{theirs}.weight", _array(attention[ours])
            yield f"{prefix}.attn.{theirs}.bias", _array(attention[f"{ours}_bias"])
        for theirs, ours in (("c_fc", "w_in"), ("c_proj", "w_out")):
            matrix = _array(experts[ours])[0]
            yield f"{prefix}.mlp.{theirs}.weight", matrix
            yield f"{prefix}.mlp.{theirs}.bias", np.zeros(matrix.shape[1], matrix.dtype)


def _norm(prefix: str, norm: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{prefix}.weight", _array(norm["scale"])
    yield f"{prefix}.bias", _array(norm["bias"])


def _array(x: Any) -> np.ndarray:
    return np.asarray(x)
