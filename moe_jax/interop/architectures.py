"""Which class of transformers, and which architecture of llama.cpp, holds which configuration.

The table is `architecture_of`. Each class computes what our model computes, to 2e-5 in float32 (`tests/interop`):

    mixtral     experts, gates renormalised over the K                       MixtralForCausalLM       llama
    qwen3_moe   the same with normalised queries and keys; K = 1 too         Qwen3MoeForCausalLM      qwen3moe
    ernie4_5_moe  balance by bias, shared experts                            Ernie4_5_MoeForCausalLM  ernie4_5-moe
    granitemoe  a tied embedding that is scaled; multipliers                 GraniteMoeForCausalLM    granitemoe
    granitemoeshared  shared experts beside it                               GraniteMoeSharedForCausalLM  none
    qwen2_moe   shared experts behind a gate, biases of q, k and v            Qwen2MoeForCausalLM      qwen2moe
    olmoe       queries and keys normalised over all heads                   OlmoeForCausalLM         olmoe
    llama       a dense baseline                                             LlamaForCausalLM         llama
    qwen3       a dense baseline with normalised queries and keys            Qwen3ForCausalLM         qwen3
    gpt2        a dense baseline with learned positions, LayerNorm, GELU     GPT2LMHeadModel          none
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from moe_jax.config import ModelConfig, QKNorm, UserError
from moe_jax.config.section import flag_of

ExportTarget = Literal["hf", "gguf", "both", "safetensors", "html"]
ExportDtype = Literal["float32", "bfloat16", "float16", "q8_0"]
"""Names of NumPy and ml_dtypes, but for q8_0, which only GGUF has."""


class Architecture(NamedTuple):
    """What a configuration is called elsewhere."""

    model_type: str
    """`model_type` in transformers' config.json."""
    class_name: str
    gguf: str | None
    """Architecture in GGUF. None if llama.cpp cannot hold the configuration."""
    gguf_problem: str = ""
    """Why not, with the option to blame."""

    def without_gguf(self, problem: str) -> "Architecture":
        """The class of a configuration that llama.cpp computes otherwise."""
        return self._replace(gguf=None, gguf_problem=problem)


MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", "llama")
QWEN2_MOE = Architecture("qwen2_moe", "Qwen2MoeForCausalLM", "qwen2moe")
QWEN3_MOE = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe")
OLMOE = Architecture("olmoe", "OlmoeForCausalLM", "olmoe")
ERNIE = Architecture("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "ernie4_5-moe")
GRANITE = Architecture("granitemoe", "GraniteMoeForCausalLM", "granitemoe")
GRANITE_SHARED = Architecture(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    None,
    "--model.shared-experts: Granite's are not written as GGUF; export to hf",
)
LLAMA = Architecture("llama", "LlamaForCausalLM", "llama")
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", "qwen3")
GPT2 = Architecture("gpt2", "GPT2LMHeadModel", None, "GPT-2 layouts are not written as GGUF; export to hf")

SHAPE = ("norm", "positions", "activation", "bias", "qkv_bias", "qk_norm", "kv_heads", "head_size", "dense")
SHAPE += ("shared_experts", "shared_gate", "scaled_embedding", "tied_head")
SHAPE += ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
ROUTING = ("top_k", "renormalise_gates", "balancing")
"""The settings that decide the class."""


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a configuration. Raises UserError, with the settings to blame, if no class holds it."""
    if config.norm == "layernorm" or config.positions == "learned" or config.activation == "gelu":
        found = _gpt2(config)
    elif config.bias or (config.qkv_bias and not config.shared_gate):
        found = None
    else:
        found = _dense(config) if config.dense != "none" else _with_experts(config)
    if config.multiplied and found not in (GRANITE, GRANITE_SHARED):
        found = None
    if found is None:
        raise UserError(
            f"{', '.join(_unusual(config))}: no class of transformers holds a model with these settings together; "
            "`--to safetensors` writes its weights with a stated layout"
        )
    return found


def _unusual(config: ModelConfig) -> Iterator[str]:
    """The settings that decide the class, where they are not the defaults."""
    usual = ModelConfig()
    for section, plain, names in ((config, usual, SHAPE), (config.routing, usual.routing, ROUTING)):
        for name in names:
            if (value := getattr(section, name)) != getattr(plain, name):
                yield f"{flag_of(section, name)} {value}"


def _gpt2(config: ModelConfig) -> Architecture | None:
    whole = (config.norm, config.positions, config.activation, config.bias, config.qk_norm, config.scaled_embedding)
    ok = config.dense != "none" and whole == ("layernorm", "learned", "gelu", True, "none", False)
    return GPT2 if ok and config.key_value_heads == config.heads and _heads_fill(config) else None


def _dense(config: ModelConfig) -> Architecture | None:
    if config.qk_norm == "full" or (config.scaled_embedding and config.tied_head):
        return None
    return QWEN3 if config.qk_norm == "head" else LLAMA


def _with_experts(config: ModelConfig) -> Architecture | None:
    routing, norm = config.routing, config.qk_norm
    by_bias, scaled_head = routing.balancing == "bias", config.scaled_embedding and config.tied_head
    shared = by_bias or config.shared_experts > 0
    renormalised = routing.top_k > 1 and routing.renormalise_gates
    if config.shared_gate:
        if by_bias or norm != "none" or scaled_head:
            return None
        if config.qkv_bias and not renormalised:
            return QWEN2_MOE
        return QWEN2_MOE.without_gguf("llama.cpp's qwen2moe has biases of q, k and v, and never renormalises the gates")
    if scaled_head or config.multiplied:
        fits = norm == "none" and not by_bias and renormalised and _heads_fill(config)
        return (GRANITE_SHARED if shared else GRANITE) if fits else None
    if norm == "full":
        if shared or not _heads_fill(config):
            return None
        if renormalised:
            return OLMOE.without_gguf("--routing.renormalise-gates: llama.cpp's olmoe never renormalises the gates")
        return OLMOE
    if shared:
        return ERNIE if norm == "none" and renormalised and _heads_fill(config) else None
    if norm == "none":
        return MIXTRAL if renormalised else None
    if renormalised:
        return QWEN3_MOE
    problem = "--routing.no-renormalise-gates: llama.cpp's qwen3moe always renormalises the gates"
    if routing.top_k == 1:
        problem = "--top-k 1: llama.cpp's qwen3moe divides the gate by itself, ours does not"
    return QWEN3_MOE.without_gguf(problem)


def _heads_fill(config: ModelConfig) -> bool:
    """Whether a head has width / heads."""
    return config.head_width * config.heads == config.width


# An import: which fields of a config.json give the shape of a model, and which must have one value


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


def multipliers(model: ModelConfig) -> dict[str, float]:
    """Granite's fields. A scaled embedding is one of its cases."""
    embedding = model.width**0.5 if model.scaled_embedding and model.tied_head else 1.0
    return {
        "embedding_multiplier": model.embedding_multiplier * embedding,
        "attention_multiplier": model.attention_multiplier or model.head_width**-0.5,
        "residual_multiplier": model.residual_multiplier,
        "logits_scaling": model.logits_scaling,
    }
