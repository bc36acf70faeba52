"""The shapes of two public mixtures, as their folders name and store the tensors."""

from collections.abc import Iterator
from typing import Any

import numpy as np

CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
    "granite": {
        "model_type": "granitemoe",
        "architectures": ["GraniteMoeForCausalLM"],
        "vocab_size": 49_155,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
}


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, as published."""
    width, hidden, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys = config["num_key_value_heads"] * width // heads
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, outputs in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            yield f"{at}.self_attn.{name}_proj.weight", (outputs, width)
        for name in ("input", "post_attention"):
            yield f"{at}.{name}_layernorm.weight", (width,)
        if config["model_type"] == "granitemoe":
            experts, moe = config["num_local_experts"], f"{at}.block_sparse_moe"
            yield f"{moe}.router.layer.weight", (experts, width)
            yield f"{moe}.input_linear.weight", (experts, 2 * hidden, width)
            yield f"{moe}.output_linear.weight", (experts, width, hidden)
            continue
        yield f"{at}.self_attn.q_norm.weight", (width,)
        yield f"{at}.self_attn.k_norm.weight", (keys,)
        yield f"{at}.mlp.gate.weight", (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
                yield f"{at}.mlp.experts.{expert}.{name}_proj.weight", shape
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], width)


def shards(config: dict[str, Any], most: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file, of at most so many bytes."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(config):
        if shard and sum(2 * int(np.prod(s)) for s in (*shard.values(), shape)) > most:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard
