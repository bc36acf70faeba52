"""A folder with the exact shape of a public mixture, and random weights: bfloat16, in shards, named as published.

    uv run python benchmarks/public_shapes.py olmoe models/olmoe          6.9 billion parameters, 13.8 GB
    uv run python benchmarks/public_shapes.py granite models/granite      1.3 billion, 2.7 GB

For measurements where no public weights can be had. `import` reads such a folder as it reads the real one. What the
model writes means nothing. The tokenizer is that of GPT-2, or that of bytes where its vocabulary cannot be had.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moe_jax.config import ConfigError, DataConfig, UserError
from moe_jax.data.tokenizers import train_tokenizer
from moe_jax.interop.tokenizers import tokenizer_json

SHARD_BYTES = 10**9
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


def shards(config: dict[str, Any], most: int = SHARD_BYTES) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file, of at most so many bytes."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(config):
        if shard and sum(2 * int(np.prod(s)) for s in (*shard.values(), shape)) > most:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write(config: dict[str, Any], folder: Path) -> None:
    """Write the folder. Matrices are normal with a standard deviation of 0.02, vectors are ones."""
    folder.mkdir(parents=True)
    try:
        tokenizer = train_tokenizer(DataConfig(tokenizer="gpt2"))
    except (ConfigError, UserError):
        tokenizer = train_tokenizer(DataConfig(tokenizer="byte"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.separator_id}, indent=1))
    noise = np.random.default_rng(0).normal(size=2**24).astype(np.float32) * 0.02
    noise = noise.astype(ml_dtypes.bfloat16)
    rng, places = np.random.default_rng(1), {}
    parts = list(shards(config))
    for number, shard in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {}
        for tensor, shape in shard.items():
            size, start = int(np.prod(shape)), int(rng.integers(len(noise) // 2))
            values = np.resize(noise[start : start + size], shape)
            tensors[tensor] = values if len(shape) > 1 else np.ones(shape, ml_dtypes.bfloat16)
            places[tensor] = name
        save_file(tensors, folder / name, {"format": "pt"})
        print(folder / name, flush=True)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    write(CONFIGS[sys.argv[1]], Path(sys.argv[2]))
