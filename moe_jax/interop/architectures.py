"""Which class of transformers, and which architecture of llama.cpp, holds which configuration.

The table is `architecture_of`. Each class computes what our model computes, to 2e-5 in float32 (`tests/interop`):

    mixtral     experts, gates renormalised over the K                       MixtralForCausalLM       llama
    qwen3_moe   the same with normalised queries and keys; K = 1 too         Qwen3MoeForCausalLM      qwen3moe
    ernie4_5_moe  balance by bias, shared experts                            Ernie4_5_MoeForCausalLM  ernie4_5-moe
    granitemoe  a tied embedding that is scaled                              GraniteMoeForCausalLM    granitemoe
    granitemoeshared  only imported: shared experts beside it                GraniteMoeSharedForCausalLM
    qwen2_moe   shared experts behind a gate, biases of q, k and v            Qwen2MoeForCausalLM      qwen2moe
    olmoe       queries and keys normalised over all heads                   OlmoeForCausalLM         olmoe
    llama       a dense baseline                                             LlamaForCausalLM         llama
    qwen3       a dense baseline with normalised queries and keys            Qwen3ForCausalLM         qwen3
    gpt2        a dense baseline with learned positions, LayerNorm, GELU     GPT2LMHeadModel          none
"""

from typing import Literal, NamedTuple

from moe_jax.config import ModelConfig, UserError

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


MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", "llama")
QWEN2_MOE = Architecture("qwen2_moe", "Qwen2MoeForCausalLM", "qwen2moe")
QWEN2_MOE_OTHER = QWEN2_MOE._replace(
    gguf=None, gguf_problem="llama.cpp's qwen2moe has biases of q, k and v, and never renormalises the gates"
)
QWEN3_MOE = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe")
QWEN3_MOE_TOP_1 = QWEN3_MOE._replace(
    gguf=None, gguf_problem="--routing.top-k 1: llama.cpp's qwen3moe divides the gate by itself, ours does not"
)
QWEN3_MOE_PLAIN = QWEN3_MOE._replace(
    gguf=None, gguf_problem="--routing.no-renormalise-gates: llama.cpp's qwen3moe always renormalises the gates"
)
OLMOE = Architecture("olmoe", "OlmoeForCausalLM", "olmoe")
OLMOE_RENORMALISED = OLMOE._replace(
    gguf=None, gguf_problem="--routing.renormalise-gates: llama.cpp's olmoe never renormalises the gates"
)
ERNIE = Architecture("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "ernie4_5-moe")
GRANITE = Architecture("granitemoe", "GraniteMoeForCausalLM", "granitemoe")
GRANITE_SHARED = Architecture("granitemoeshared", "GraniteMoeSharedForCausalLM", None)
LLAMA = Architecture("llama", "LlamaForCausalLM", "llama")
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", "qwen3")
GPT2 = Architecture("gpt2", "GPT2LMHeadModel", None, "GPT-2 layouts are not written as GGUF; export to hf")


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a configuration. Raises UserError, with the option to blame, if no class holds it."""
    if config.norm == "layernorm" or config.positions == "learned" or config.activation == "gelu":
        return _gpt2(config)
    if config.bias:
        raise _unheld("--model.bias", "no class has biases in attention only")
    if config.qkv_bias and not config.shared_gate:
        raise _unheld("--model.qkv-bias", "the class with these biases has shared experts behind a gate")
    if config.dense != "none":
        if config.scaled_embedding and config.tied_head:
            raise _unheld("--model.scaled-embedding", "no dense class scales a tied embedding")
        if config.qk_norm == "full":
            raise _unheld("--model.qk-norm full", "no dense class with norms before each half has it")
        return QWEN3 if config.qk_norm == "head" else LLAMA
    return _with_experts(config)


def _with_experts(config: ModelConfig) -> Architecture:
    routing = config.routing
    shared, single = routing.balancing == "bias" or config.shared_experts > 0, routing.top_k == 1
    plain = not routing.renormalise_gates and not single
    own_width = config.head_width * config.heads != config.width
    if config.shared_gate:
        if routing.balancing == "bias" or config.qk_norm != "none" or (config.scaled_embedding and config.tied_head):
            raise _unheld("--model.shared-gate", "the class with this gate has no other options of ours")
        return QWEN2_MOE if config.qkv_bias and (plain or single) else QWEN2_MOE_OTHER
    if config.scaled_embedding and config.tied_head:
        if config.qk_norm != "none" or shared or single or plain or own_width:
            raise _unheld("--model.scaled-embedding", "with a tied head, no class has the other options too")
        return GRANITE
    if config.qk_norm == "full":
        if shared:
            raise _unheld("--model.qk-norm full", "no class has it beside balance by bias or shared experts")
        if own_width:
            raise _unheld("--model.head-size", "the class that normalises over all heads has width / heads")
        return OLMOE if plain or single else OLMOE_RENORMALISED
    if shared:
        if config.qk_norm == "head":
            raise _unheld("--model.qk-norm", "no class has it beside balance by bias or shared experts")
        if single or plain:
            option = "--routing.top-k 1" if single else "--routing.no-renormalise-gates"
            raise _unheld(option, "the class with shared experts always renormalises the gates, ours does not")
        if own_width:
            raise _unheld("--model.head-size", "the class with shared experts has width / heads")
        return ERNIE
    if single or plain:
        if config.qk_norm == "none":
            option = "--routing.top-k 1" if single else "--routing.no-renormalise-gates"
            raise _unheld(option, "the classes that keep the gates need --model.qk-norm head or full")
        return QWEN3_MOE_TOP_1 if single else QWEN3_MOE_PLAIN
    return QWEN3_MOE if config.qk_norm == "head" else MIXTRAL


def _gpt2(config: ModelConfig) -> Architecture:
    if config.dense == "none":
        blamed = {"--model.positions learned": config.positions, "--model.norm layernorm": config.norm}
        option = next((o for o, value in blamed.items() if o.endswith(value)), "--model.activation gelu")
        raise _unheld(option, "no class has it together with experts")
    whole = (config.norm, config.positions, config.activation, config.bias, config.qk_norm, config.scaled_embedding)
    if whole != ("layernorm", "learned", "gelu", True, "none", False):
        raise _unheld(
            f"--model.norm {config.norm} --model.positions {config.positions} --model.activation {config.activation}",
            "GPT-2 is layernorm, learned and gelu with biases; Llama is rmsnorm, rope and swiglu",
        )
    if config.key_value_heads != config.heads or config.head_width * config.heads != config.width:
        raise _unheld("--model.kv-heads, --model.head-size", "GPT-2 has one key head for each head, of width / heads")
    return GPT2


def _unheld(option: str, why: str) -> UserError:
    return UserError(
        f"{option}: no class of transformers holds this model ({why}); `--to safetensors` writes its weights with a "
        "stated layout"
    )
