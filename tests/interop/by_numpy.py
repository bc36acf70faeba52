"""What the classes of transformers compute, in NumPy, from a config.json and tensors by their names there.

Written from the definitions of the classes, not from our code: one token attends to the earlier ones in a loop over
heads, and one token after another goes through its experts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

type Tensors = Mapping[str, np.ndarray]

EPS = {"mixtral": 1e-5, "olmoe": 1e-5}
"""`rms_norm_eps` where it is left out; else 1e-6."""


def logits_of(config: dict[str, Any], tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """[T, V]: the logits after each token."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    return _gpt2(config, tensors, tokens) if config["model_type"] == "gpt2" else _llama(config, tensors, tokens)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, factor: float) -> np.ndarray:
    """q [T, H, A], k and v [T, KV, A] -> [T, H A]."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        for h in range(q.shape[1]):
            shared = h // (q.shape[1] // k.shape[1])
            out[t, h] = _softmax(k[: t + 1, shared] @ q[t, h] * factor) @ v[: t + 1, shared]
    return out.reshape(len(q), -1)


def _rotated(x: np.ndarray, theta: float, interleaved: bool) -> np.ndarray:
    """[T, H, A]: pairs (2i, 2i + 1) of a head, or (i, i + A / 2), turned by t / theta^(2i / A)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    out = np.empty_like(x)
    out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    out[..., second] = x[..., second] * np.cos(angle) + x[..., first] * np.sin(angle)
    return out


def _llama(config: dict[str, Any], tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    kind, heads, width = config["model_type"], config["num_attention_heads"], config["hidden_size"]
    size, eps = config.get("head_dim", width // heads), config.get("rms_norm_eps", EPS.get(kind, 1e-6))
    theta = config.get("rope_theta", 1e6 if kind == "mixtral" else 1e4)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * tensors[name]

    table = tensors["model.embed_tokens.weight"]
    x = table[tokens] * config.get("embedding_multiplier", 1)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (h @ tensors[f"{at}.self_attn.{name}_proj.weight"].T for name in "qkv")
        if f"{at}.self_attn.q_proj.bias" in tensors:
            q, k, v = (
                x + tensors[f"{at}.self_attn.{name}_proj.bias"] for x, name in zip((q, k, v), "qkv", strict=True)
            )
        if kind == "olmoe":
            q, k = norm(q, f"{at}.self_attn.q_norm.weight"), norm(k, f"{at}.self_attn.k_norm.weight")
        q, k, v = (part.reshape(len(x), -1, size) for part in (q, k, v))
        if kind in ("qwen3", "qwen3_moe"):
            q, k = norm(q, f"{at}.self_attn.q_norm.weight"), norm(k, f"{at}.self_attn.k_norm.weight")
        q, k = (_rotated(part, theta, config.get("rotates_pairs", kind == "ernie4_5_moe")) for part in (q, k))
        mixed = _attend(q, k, v, config.get("attention_multiplier", size**-0.5))
        residual = config.get("residual_multiplier", 1)
        x = x + residual * mixed @ tensors[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        x = x + residual * np.stack([_network(config, tensors, at, token) for token in h])
    head = table if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    return norm(x, "model.norm.weight") @ head.T / config.get("logits_scaling", 1)


def _expert(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return down @ (_silu(gate @ x) * (up @ x))


def _network(config: dict[str, Any], tensors: Tensors, at: str, x: np.ndarray) -> np.ndarray:
    """The feed-forward network of one token."""
    kind = config["model_type"]
    router = next((tensors[f"{at}.{name}.weight"] for name in ROUTERS if f"{at}.{name}.weight" in tensors), None)
    if router is None:
        return _expert(x, *(tensors[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    probs = _softmax(router @ x)
    bias = tensors.get(f"{at}.mlp.moe_statics.e_score_correction_bias", np.zeros((1, len(probs))))[0]
    best = np.argsort(-(probs + bias), kind="stable")[: config.get("num_experts_per_tok") or config["moe_k"]]
    gates = probs[best]
    if config.get("norm_topk_prob", kind not in ("qwen2_moe", "qwen3_moe", "olmoe")):
        gates = gates / gates.sum()
    y = sum(gate * _expert(x, *_of_expert(tensors, at, expert)) for gate, expert in zip(gates, best, strict=True))
    if f"{at}.mlp.shared_experts.gate_proj.weight" in tensors:
        names = (f"{at}.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))
        y = y + _expert(x, *map(tensors.__getitem__, names))
    if f"{at}.mlp.shared_expert_gate.weight" in tensors:
        names = (f"{at}.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down"))
        share = 1 / (1 + np.exp(-tensors[f"{at}.mlp.shared_expert_gate.weight"] @ x))
        y = y + share * _expert(x, *map(tensors.__getitem__, names))
    if f"{at}.shared_mlp.input_linear.weight" in tensors:
        gate, up = np.split(tensors[f"{at}.shared_mlp.input_linear.weight"], 2)
        y = y + _expert(x, gate, up, tensors[f"{at}.shared_mlp.output_linear.weight"])
    return np.asarray(y)


ROUTERS = ("mlp.gate", "block_sparse_moe.gate", "block_sparse_moe.router.layer")


def _of_expert(tensors: Tensors, at: str, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its gate, up and down projections, by whatever names the experts of a class have."""
    for both, down in (
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    ):
        if f"{at}.{both}" in tensors:
            gate, up = np.split(tensors[f"{at}.{both}"][expert], 2)
            return gate, up, tensors[f"{at}.{down}"][expert]
    for folder, names in (("block_sparse_moe", ("w1", "w3", "w2")), ("mlp", ("gate_proj", "up_proj", "down_proj"))):
        if f"{at}.{folder}.experts.{expert}.{names[0]}.weight" in tensors:
            gate, up, down = (tensors[f"{at}.{folder}.experts.{expert}.{name}.weight"] for name in names)
            return gate, up, down
    raise KeyError(at)


def _gpt2(config: dict[str, Any], tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Projections are [in, out], and have biases."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(-1, keepdims=True) + config["layer_norm_epsilon"])
        return centred / spread * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    heads, size = config["n_head"], config["n_embd"] // config["n_head"]
    table = tensors["transformer.wte.weight"]
    x = table[tokens] + tensors["transformer.wpe.weight"][: len(tokens)]
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}"
        q, k, v = np.split(linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn"), 3, axis=-1)
        q, k, v = (part.reshape(len(x), heads, size) for part in (q, k, v))
        x = x + linear(_attend(q, k, v, size**-0.5), f"{at}.attn.c_proj")
        h = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{at}.mlp.c_proj")
    head = table if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    return norm(x, "transformer.ln_f") @ head.T
