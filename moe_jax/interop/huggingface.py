"""A model as transformers reads it: config.json, and the tensors by name.

Tensors have the names of transformers 4, which transformers 5 fuses at load. A projection is stored [out, in].
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.interop.architectures import ERNIE, GPT2, GRANITE, Architecture
from moe_jax.interop.source import ExportSource, attention, embedding, experts

type Tensors = Iterator[tuple[str, np.ndarray]]
"""(name, float32 array), one at a time, so that the model is never in memory twice."""


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
    return shared | (_gpt2_config(model) if architecture == GPT2 else _llama_config(model, architecture))


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": model.seq_len,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.dense_hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": norm_eps(model),
    }


def _llama_config(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    config = {
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": norm_eps(model),
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "intermediate_size": model.expert_hidden if model.dense == "none" else model.dense_hidden,
        "use_cache": True,
    }
    return config if model.dense != "none" else config | _expert_config(model, architecture)


def _expert_config(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    top_k = model.routing.top_k
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
    if architecture == GRANITE:
        return {
            "num_local_experts": model.experts,
            "num_experts_per_tok": top_k,
            "embedding_multiplier": float(np.sqrt(model.width)),
            "attention_multiplier": float(1 / np.sqrt(model.head_width)),
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    if architecture.model_type == "mixtral":
        return {"num_local_experts": model.experts, "num_experts_per_tok": top_k, "sliding_window": None}
    return {
        "num_experts": model.experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": model.expert_hidden,
        "norm_topk_prob": top_k > 1 and model.routing.renormalise_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tensors(source: ExportSource, architecture: Architecture) -> Tensors:
    """All tensors of the model."""
    if architecture == GPT2:
        yield from _gpt2_tensors(source)
        return
    yield "model.embed_tokens.weight", embedding(source)
    for layer in range(source.config.model.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", source.block(layer, "attention_norm.scale")
        yield f"{at}.post_attention_layernorm.weight", source.block(layer, "ffn_norm.scale")
        projections = attention(source, layer, interleaved=architecture == ERNIE)
        for name, weight in zip("qkvo", projections, strict=True):
            yield f"{at}.self_attn.{name}_proj.weight", weight
        if source.config.model.qk_norm != "none":
            yield f"{at}.self_attn.q_norm.weight", source.block(layer, "attention.query_norm.scale")
            yield f"{at}.self_attn.k_norm.weight", source.block(layer, "attention.key_norm.scale")
        yield from _ffn(source, architecture, layer, at)
    yield "model.norm.weight", source.array("norm.scale")
    if not source.config.model.tied_head:
        yield "lm_head.weight", source.array("head").T


def _ffn(source: ExportSource, architecture: Architecture, layer: int, at: str) -> Tensors:
    networks = experts(source, layer)
    if source.config.model.dense != "none":
        for name, weight in zip(("gate", "up", "down"), networks, strict=True):
            yield f"{at}.mlp.{name}_proj.weight", weight[0]
        return
    router = source.block(layer, "ffn.router").T
    if architecture == GRANITE:
        yield f"{at}.block_sparse_moe.router.layer.weight", router
        yield f"{at}.block_sparse_moe.input_linear.weight", np.concatenate([networks.gate, networks.up], 1)
        yield f"{at}.block_sparse_moe.output_linear.weight", networks.down
        return
    mixtral = architecture.model_type == "mixtral"
    network = "block_sparse_moe" if mixtral else "mlp"
    yield f"{at}.{network}.gate.weight", router
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for expert in range(source.config.model.experts):
        for name, weight in zip(names, networks, strict=True):
            yield f"{at}.{network}.experts.{expert}.{name}.weight", weight[expert]
    if architecture == ERNIE:
        yield f"{at}.mlp.moe_statics.e_score_correction_bias", _correction(source, layer)[None]
        if source.config.model.shared_experts:
            for name, weight in zip(names, experts(source, layer, "ffn.shared"), strict=True):
                yield f"{at}.mlp.shared_experts.{name}.weight", weight[0]


def _correction(source: ExportSource, layer: int) -> np.ndarray:
    """The bias that is added when experts are chosen; zeros if the load is balanced by the loss."""
    model = source.config.model
    if model.routing.balancing == "bias":
        return source.block(layer, "ffn.balance_bias")
    return np.zeros(model.experts, np.float32)


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
