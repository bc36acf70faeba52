"""Small random models in Hugging Face folders, as transformers writes them; and the parts of such folders by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.config import DataConfig, UserError
from moe_jax.data.tokenizers import train_tokenizer
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.tokenizers import tokenizer_json
from moe_jax.model.transformer import abstract_model

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}
"""The tokenizer is that of bytes: 256 and a separator."""
EXPERTS = {"num_experts_per_tok": 2}
GRANITE = {
    "num_local_experts": 4,
    "embedding_multiplier": 12,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.22,
    "logits_scaling": 1.5,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "rope_theta": 1e5, "rms_norm_eps": 1e-5},
    "llama, tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama, llama3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
    "llama, yarn": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "qwen3": {"head_dim": 16, "rope_theta": 1e6},
    "qwen3, tied": {"head_dim": 8, "tie_word_embeddings": True},
    "mixtral": {**EXPERTS, "num_local_experts": 4, "head_dim": 16},
    "mixtral, tied": {**EXPERTS, "num_local_experts": 4, "tie_word_embeddings": True, "sliding_window": 64},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_moe, tied": {
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "olmoe": {**EXPERTS, "num_experts": 4},
    "olmoe, tied": {**EXPERTS, "num_experts": 4, "tie_word_embeddings": True, "norm_topk_prob": True},
    "qwen2_moe": {
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
    },
    "qwen2_moe, tied": {
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "tie_word_embeddings": True,
    },
    "granitemoe": {**EXPERTS, **GRANITE, "tie_word_embeddings": True},
    "granitemoe, untied": {**EXPERTS, **GRANITE, "attention_multiplier": 1, "rope_theta": 1.5e6},
    "granitemoeshared": {**EXPERTS, **GRANITE, "shared_intermediate_size": 96},
    "granitemoeshared, tied": {**EXPERTS, **GRANITE, "tie_word_embeddings": True},
}
"""Name -> what config.json says besides SHAPE. The part before the comma is the `model_type`."""


def byte_tokenizer(folder: Path) -> None:
    """Write the tokenizer of plain bytes, as our export writes it."""
    tokenizer = train_tokenizer(DataConfig(tokenizer="byte"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer), indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("<|endoftext|>".join(f"Once a dragon met a cat, and they ate {i} cakes." for i in range(80)))
    return path


def llama_tensors(rng: np.random.Generator, **changes: int) -> dict[str, np.ndarray]:
    """The tensors of a Llama of SHAPE, by hand."""
    s = SHAPE | changes
    width, hidden, heads, keys = 32, s["intermediate_size"], s["num_attention_heads"], s["num_key_value_heads"]
    size = width // heads
    shapes = {"model.embed_tokens.weight": (s["vocab_size"], width), "model.norm.weight": (width,)}
    for layer in range(s["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (heads * size, width),
            f"{at}.self_attn.k_proj.weight": (keys * size, width),
            f"{at}.self_attn.v_proj.weight": (keys * size, width),
            f"{at}.self_attn.o_proj.weight": (width, heads * size),
            f"{at}.mlp.gate_proj.weight": (hidden, width),
            f"{at}.mlp.up_proj.weight": (hidden, width),
            f"{at}.mlp.down_proj.weight": (width, hidden),
        }
    return {name: rng.normal(size=shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


def llama(folder: Path, dtype: Any = np.float32, **changes: Any) -> Path:
    """A folder with a tied random Llama, made without torch. `changes` of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = {name: array.astype(dtype) for name, array in llama_tensors(np.random.default_rng(0)).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer(folder)
    return folder


def read(folder: Path) -> Any:
    opened = Pretrained.open(folder, "--init-from")
    return opened.params(abstract_model(opened.shape.model)[1])


def refused(folder: Path, said: str, error: type[Exception] = UserError) -> None:
    """One line that says what is wrong, with the name of the folder."""
    with pytest.raises(error) as failure:
        read(folder)
    text = str(failure.value)
    assert said in text
    assert str(folder) in text
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 500


def by_transformers(folder: Path, name: str, dtype: str = "float32", **options: Any) -> Any:
    """A folder with a random model that transformers has made and saved. Returns the model."""
    import torch
    import transformers

    kind = name.partition(",")[0]
    config = transformers.AutoConfig.for_model(kind, **(SHAPE | LAYOUTS[name] | options.pop("config", {})))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.ndim == 1 else 0.3 / min(parameter.shape[-2:]) ** 0.5
            parameter.add_(torch.randn_like(parameter) * spread)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **options)
    byte_tokenizer(folder)
    return model
