"""config.json of an export, for transformers."""

import json
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.interop.architectures import ERNIE, GPT2, GRANITE, MIXTRAL, QWEN2_MOE, Architecture
from moe_jax.interop.source import ExportSource


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
    scaling = json.loads(model.rope_scaling or "{}")
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta} | scaling,
        "rope_scaling": scaling or None,
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
    if architecture == MIXTRAL:
        return {"num_local_experts": model.experts, "num_experts_per_tok": top_k, "sliding_window": None}
    return {
        **(_qwen2(model) if architecture.model_type == QWEN2_MOE.model_type else {}),
        "num_experts": model.experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": model.expert_hidden,
        "norm_topk_prob": top_k > 1 and model.routing.renormalise_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2(model: ModelConfig) -> dict[str, Any]:
    shared = model.shared_experts * model.expert_hidden
    return {"shared_expert_intermediate_size": shared, "qkv_bias": model.qkv_bias, "use_sliding_window": False}
