"""Which class of transformers, and which architecture of llama.cpp, holds which configuration.

The table is `architecture_of`. Each class computes what our model computes, to 2e-5 in float32 (`tests/interop`):

    mixtral     experts, gates renormalised over the K                       MixtralForCausalLM       llama
    qwen3_moe   the same with normalised queries and keys; K = 1 too         Qwen3MoeForCausalLM      qwen3moe
    ernie4_5_moe  balance by bias, shared experts                            Ernie4_5_MoeForCausalLM  ernie4_5-moe
    granitemoe  a tied embedding that is scaled                              GraniteMoeForCausalLM    granitemoe
    llama       a dense baseline                                             LlamaForCausalLM         llama
    qwen3       a dense baseline with normalised queries and keys            Qwen3ForCausalLM         qwen3
    gpt2        a dense baseline with learned positions, LayerNorm, GELU     GPT2LMHeadModel          none
"""

from typing import NamedTuple

from moe_jax.config import ModelConfig, UserError


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
QWEN3_MOE = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe")
QWEN3_MOE_TOP_1 = QWEN3_MOE._replace(
    gguf=None, gguf_problem="--routing.top-k 1: llama.cpp's qwen3moe divides the gate by itself, ours does not"
)
ERNIE = Architecture("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "ernie4_5-moe")
GRANITE = Architecture("granitemoe", "GraniteMoeForCausalLM", "granitemoe")
LLAMA = Architecture("llama", "LlamaForCausalLM", "llama")
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", "qwen3")
GPT2 = Architecture("gpt2", "GPT2LMHeadModel", None, "GPT-2 layouts are not written as GGUF; export to hf")


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a configuration. Raises UserError, with the option to blame, if no class holds it."""
    if config.norm == "layernorm" or config.positions == "learned" or config.activation == "gelu":
        return _gpt2(config)
    if config.bias:
        raise _unheld("--model.bias", "no class has biases in attention only")
    if config.dense != "none":
        if config.scaled_embedding and config.tied_head:
            raise _unheld("--model.scaled-embedding", "no dense class scales a tied embedding")
        return QWEN3 if config.qk_norm else LLAMA
    return _with_experts(config)


def _with_experts(config: ModelConfig) -> Architecture:
    shared = config.routing.balancing == "bias" or config.shared_experts > 0
    if config.scaled_embedding and config.tied_head:
        if config.qk_norm or shared or config.routing.top_k == 1:
            raise _unheld("--model.scaled-embedding", "with a tied head, no class has the other options too")
        return GRANITE
    if shared:
        if config.qk_norm:
            raise _unheld("--model.qk-norm", "no class has it beside balance by bias or shared experts")
        if config.routing.top_k == 1:
            raise _unheld(
                "--routing.top-k 1", "the class with shared experts divides the gate by itself, ours does not"
            )
        return ERNIE
    if config.routing.top_k == 1:
        if not config.qk_norm:
            raise _unheld("--routing.top-k 1", "the class that keeps the gate of one expert needs --model.qk-norm")
        return QWEN3_MOE_TOP_1
    return QWEN3_MOE if config.qk_norm else MIXTRAL


def _gpt2(config: ModelConfig) -> Architecture:
    if config.dense == "none":
        blamed = {"--model.positions learned": config.positions, "--model.norm layernorm": config.norm}
        option = next((o for o, value in blamed.items() if o.endswith(value)), "--model.activation gelu")
        raise _unheld(option, "no class has it together with experts")
    whole = (config.norm, config.positions, config.activation, config.bias, config.qk_norm, config.scaled_embedding)
    if whole != ("layernorm", "learned", "gelu", True, False, False):
        raise _unheld(
            f"--model.norm {config.norm}, --model.positions {config.positions}, --model.activation {config.activation}",
            "GPT-2 is layernorm, learned and gelu with --model.bias; Llama is rmsnorm, rope and swiglu",
        )
    return GPT2


def _unheld(option: str, why: str) -> UserError:
    return UserError(
        f"{option}: no class of transformers holds this model ({why}); `--to safetensors` writes its weights with a "
        "stated layout"
    )
