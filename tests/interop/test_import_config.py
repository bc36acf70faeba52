"""What a config.json or a tokenizer.json says that our model cannot hold is refused by name. Without torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import ConfigError
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.pretrained_shape import holds_pretrained, read_shape
from moe_jax.model.costs import count_parameters, totals
from tests.interop.made import llama, read, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "hf")


# config.json


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown class": ({"model_type": "deepseek_v3"}, 'model_type is "deepseek_v3", and must be one of llama, qwen3'),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, 'must be ["LlamaForCausalLM"]'),
    "a scaled rotation": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
        "and must be of the rope_type default, linear, llama3, yarn to be imported",
    ),
    "a scaled rotation of version 5": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        "must be an object with factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, each a",
    ),
    "two bases": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta is 10000.0, and rope_parameters.rope_theta 1000000.0; make them equal",
    ),
    "two rotations": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        'rope_scaling is {"type": "linear", "factor": 2.0}, and must be the same as rope_parameters',
    ),
    "an activation": ({"hidden_act": "gelu"}, 'hidden_act is "gelu", and must be "silu"'),
    "clipped queries": ({"clip_qkv": 8.0}, "clip_qkv is 8.0, and must be null"),
    "dense layers between": ({"mlp_only_layers": [0]}, "mlp_only_layers is [0], and must be []"),
    "quantized": ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}, and must be null'),
    "a multiplier of nothing": (
        {"model_type": "granitemoe", "architectures": [], "logits_scaling": 0},
        "logits_scaling is 0, and must be a number from 1e-06",
    ),
    "a shared expert of an odd size": (
        {"model_type": "granitemoeshared", "architectures": [], "num_local_experts": 4, "shared_intermediate_size": 50},
        "shared_intermediate_size is 50, and must be a multiple of 48, the width of an expert",
    ),
    "layers of an unknown kind": ({"layer_types": ["chunked_attention"] * 2}, "layer_types is "),
    "sizes of the wrong type": ({"hidden_size": "32"}, 'hidden_size is "32", and must be a whole number'),
    "an odd head": ({"head_dim": 7}, "--model.head-size 7: must be even"),
    "an endless base": ({"rope_theta": 1e999}, "rope_theta is Infinity"),
    "an end of text beyond": ({"eos_token_id": 9999}, "the token that ends a text is 9999"),
    "a small vocabulary": ({"vocab_size": 100}, "tokenizer.json has 257 ids, and config.json says vocab_size 100"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_our_model_cannot_hold_is_named(name: str, folder: Path) -> None:
    changes, said = CONFIGS[name]
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | changes).replace("Infinity", "1e999")
    (folder / "config.json").write_text(text)
    refused(folder, said)


@pytest.mark.parametrize(
    ("content", "is_one"),
    [
        ('{"model_type": "llama"}', True),
        ('{"schema": 3}', False),
        ('["model_type"]', False),
        ("{", False),
        ("1", False),
    ],
)
def test_a_model_for_transformers_is_known_by_its_type(tmp_path: Path, content: str, is_one: bool) -> None:
    (tmp_path / "config.json").write_text(content)
    assert holds_pretrained(tmp_path) == is_one


def test_fields_that_change_nothing_are_accepted(folder: Path) -> None:
    """Those of SmolLM2-135M, and some that other programs add."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "rope_scaling": None}
    config |= {"initializer_range": 0.0416, "torch_dtype": "bfloat16", "transformers_version": "4.40.1"}
    config |= {
        "mystery_factor": 3,
        "unsloth_version": "2024.9",
        "_name_or_path": "x",
        "use_cache": True,
        "layer_types": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    read(folder)


LEFT_OUT = {
    "llama": (1e-6, 1e4, 8, 8, None),
    "qwen3": (1e-6, 1e4, 32, 128, None),
    "mixtral": (1e-5, 1e6, 8, 8, (2, True)),
    "qwen3_moe": (1e-6, 1e4, 4, 8, (8, False)),
    "olmoe": (1e-5, 1e4, 8, 8, (8, False)),
    "granitemoe": (1e-6, 1e4, 8, 8, (2, True)),
    "qwen2_moe": (1e-6, 1e4, 16, 8, (4, False)),
    "granitemoeshared": (1e-6, 1e4, 8, 8, (2, True)),
}
"""Class of transformers -> what a field that is left out means there: rms_norm_eps, rope_theta, num_key_value_heads,
head_dim, and (num_experts_per_tok, norm_topk_prob)."""


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_field_that_is_left_out_has_the_default_of_the_class(name: str, folder: Path) -> None:
    eps, theta, kv_heads, head_width, routing = LEFT_OUT[name]
    heads = max(kv_heads, 8)
    config = {"model_type": name, "vocab_size": 260, "hidden_size": 8 * heads, "num_hidden_layers": 1}
    config |= {"num_attention_heads": heads, "intermediate_size": 8, "max_position_embeddings": 64}
    config |= {"moe_intermediate_size": 8, "num_experts": 16, "num_local_experts": 16}
    (folder / "config.json").write_text(json.dumps(config))
    model = read_shape(folder, "--init-from").model
    assert (model.norm_eps, model.rope_theta) == (eps, theta)
    assert (model.key_value_heads, model.head_width) == (kv_heads, head_width)
    assert not model.tied_head
    assert model.shared_experts == (704 if name == "qwen2_moe" else 0)
    assert model.qkv_bias == model.shared_gate == (name == "qwen2_moe")
    if routing is not None:
        assert (model.routing.top_k, model.routing.renormalise_gates) == routing


QWEN = {"hidden_act": "silu", "bos_token_id": 151643, "rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 1e6}
QWEN |= {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "use_sliding_window": False}
QWEN |= {"decoder_sparse_step": 1, "output_router_logits": False, "router_aux_loss_coef": 0.001, "hidden_size": 2048}
QWEN |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_window_layers": 48, "eos_token_id": 151645}
GRANITE = {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "attention_bias": False}
GRANITE |= {"attention_dropout": 0.0, "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0}
GRANITE |= {"eos_token_id": 0, "hidden_act": "silu", "initializer_range": 0.02, "intermediate_size": 512}
GRANITE |= {"max_position_embeddings": 131072, "num_experts_per_tok": 8, "num_key_value_heads": 8, "pad_token_id": 0}
GRANITE |= {"output_router_logits": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-6, "rope_scaling": None}
GRANITE |= {"router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49155}
PUBLIC: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "OLMoE-1B-7B": (
        {"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None}
        | {"eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02}
        | {"intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False}
        | {"num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16}
        | {"num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-5}
        | {"rope_scaling": None, "rope_theta": 1e4, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False}
        | {"torch_dtype": "bfloat16", "transformers_version": "4.43.0", "use_cache": True, "vocab_size": 50304},
        (6.9, 1.3),
    ),
    "Granite-3.1-1B-A400M": (
        GRANITE
        | {"hidden_size": 1024, "logits_scaling": 6.0, "num_attention_heads": 16, "num_hidden_layers": 24}
        | {"num_local_experts": 32, "rope_theta": 1.5e6},
        (1.3, 0.4),
    ),
    "Qwen1.5-MoE-A2.7B": (
        QWEN
        | {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "intermediate_size": 5632}
        | {"max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408}
        | {"norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4}
        | {"num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632}
        | {"sliding_window": 32768},
        (14.3, 2.7),
    ),
    "Qwen3-30B-A3B": (
        QWEN
        | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False}
        | {"head_dim": 128, "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": []}
        | {"moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128}
        | {"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_scaling": None}
        | {"sliding_window": None},
        (30.5, 3.3),
    ),
}
"""Public model -> its config.json, and the 10^9 parameters that its makers name: all, and the active ones."""


@pytest.mark.parametrize("name", PUBLIC)
def test_the_parameters_of_public_models(name: str, tmp_path: Path) -> None:
    config, (expected, active) = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(tmp_path, "--init-from")
    count, table = totals(count_parameters(shape.model)), shape.model.vocab_size * shape.model.width
    assert round(count.total / 1e9, 1) == expected
    # Makers count the whole embedding as active; we count one row. IBM counts no tables, and rounds down.
    assert (count.active + table * (not shape.model.tied_head)) / 1e9 == pytest.approx(active, abs=0.09)


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_the_base_of_the_rotation_may_stand_in_its_own_object(field: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for rope, theta in (({"rope_type": "default", "rope_theta": 5e5}, 5e5), ({"type": "default"}, 1e4)):
        (folder / "config.json").write_text(json.dumps(config | {field: rope}))
        assert read_shape(folder, "--init-from").model.rope_theta == theta


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model_type": "llama", "rms_norm_eps": NaN}']
)
def test_a_config_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json: ")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "no", "is no folder", ConfigError)
    refused(Path("owner/name-1B"), "`uvx hf download OWNER/NAME --local-dir NAME` downloads", ConfigError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json", ConfigError)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"schema_version": 3}')
    refused(tmp_path / "run", "is a run of moe-jax", ConfigError)


# Tokenizers


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


def cut(pattern: Any, behaviour: str, after: Any) -> dict[str, Any]:
    """A pre-tokenizer that cuts a text at a pattern, before another one."""
    pattern = {"String": pattern} if isinstance(pattern, str) else pattern
    split = {"type": "Split", "pattern": pattern, "behavior": behaviour, "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, after]}


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "Unigram": (lambda t: t["model"].update(type="Unigram"), "tokenizer.json: cannot be read"),
    "random": (lambda t: t["model"].update(dropout=0.1), "must be a BPE without dropout"),
    "lower case": (
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        "does not give every character of a text back",
    ),
    "a replaced word": (
        lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": "dragon"}, "content": "cat"}),
        "replaces {'String': 'dragon'}, so a text would not come back",
    ),
    "a removed word": (
        lambda t: t.update(pre_tokenizer=cut("dragon", "Removed", t["pre_tokenizer"])),
        "removes {'String': 'dragon'}, so a text would not come back",
    ),
    "eaten spaces": (
        lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"content": "=", "special": False, "lstrip": True}),
        "removes the spaces beside =, so a text would not come back",
    ),
    "a panic": (
        lambda t: t.update(pre_tokenizer=cut({"Regex": "(.*)*!(.*)*~(.*)*="}, "Isolated", t["pre_tokenizer"])),
        "retry-limit-in-match over",
    ),
    "a huge id": (lambda t: t["model"]["vocab"].update(a=2**40), "tokenizer.json: cannot be read"),
    "a lost byte": (lambda t: t["model"]["vocab"].pop("\u00f4"), "does not give every character of a text back"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_unknown_kinds_of_tokenizers(name: str, folder: Path) -> None:
    change, said = TOKENIZERS[name]
    edit_tokenizer(folder, change)
    refused(folder, said)


def test_a_folder_without_a_tokenizer_or_an_end_of_text(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert Pretrained.open(folder, "--init-from").tokenizer.separator_id == 256  # by tokenizer_config.json
    (folder / "tokenizer_config.json").unlink()
    refused(folder, "has no eos_token_id, and tokenizer_config.json no eos_token")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json: cannot be read ([Errno 2] No such file")
