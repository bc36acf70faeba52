"""Which fields of a config.json give the shape of a model, and which must have one value."""

from typing import Any, NamedTuple

from moe_jax.config import QKNorm
from moe_jax.interop.architectures import (
    GRANITE,
    GRANITE_SHARED,
    LLAMA,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    Architecture,
)


class Layout(NamedTuple):
    """A class of transformers: where its fields are, and what a missing field means."""

    architecture: Architecture
    eps: float
    theta: float = 10_000.0
    kv_heads: int | None = None
    """None: as many as attention heads."""
    head_dim: int | None = None
    """None: width / heads."""
    qk_norm: QKNorm = "none"
    experts: str = ""
    """The field with the number of experts. Empty: a dense model."""
    hidden: str = "intermediate_size"
    top_k: int = 0
    renormalise: bool | None = None
    """What a missing `norm_topk_prob` means; None: the class has no such field, and always renormalises."""
    shared: str = ""
    """The field with the hidden width of the shared experts."""
    shared_hidden: int = 0
    """What it means if it is left out."""
    gated: bool = False
    """Whether the shared experts have a gate, and queries, keys and values have biases."""
    multipliers: bool = False


_EXPERTS: dict[str, Any] = {"experts": "num_experts", "top_k": 8, "renormalise": False}
_QWEN2 = _EXPERTS | {"top_k": 4, "shared": "shared_expert_intermediate_size", "shared_hidden": 5632}
_GRANITE: dict[str, Any] = {"experts": "num_local_experts", "top_k": 2, "multipliers": True}
LAYOUTS = {
    layout.architecture.model_type: layout
    for layout in (
        Layout(LLAMA, 1e-6),
        Layout(QWEN3, 1e-6, kv_heads=32, head_dim=128, qk_norm="head"),
        Layout(MIXTRAL, 1e-5, 1e6, kv_heads=8, experts="num_local_experts", top_k=2),
        Layout(QWEN3_MOE, 1e-6, kv_heads=4, qk_norm="head", hidden="moe_intermediate_size", **_EXPERTS),
        Layout(OLMOE, 1e-5, qk_norm="full", **_EXPERTS),
        Layout(QWEN2_MOE, 1e-6, kv_heads=16, hidden="moe_intermediate_size", gated=True, **_QWEN2),
        Layout(GRANITE, 1e-6, **_GRANITE),
        Layout(GRANITE_SHARED, 1e-6, shared="shared_intermediate_size", **_GRANITE),
    )
}
"""`model_type` -> its layout. The defaults are those of the classes in transformers."""

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
"""Fields of Granite."""
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "qkv_bias": (False, None),
    "use_bias": (False, None),
    "clip_qkv": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "auto_map": (None,),
    "embedding_multiplier": (1, None),
    "attention_multiplier": (None,),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "scoring_func": ("softmax", None),
}
"""Field -> the values with which the model computes what ours does."""
