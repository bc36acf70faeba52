"""The same logits here, in transformers and in llama.cpp, for every architecture of the table."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_jax
from moe_jax.config.presets import preset
from moe_jax.interop import gguf_file
from moe_jax.interop.architectures import architecture_of
from moe_jax.interop.export import export
from moe_jax.interop.source import open_source
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.saved import save

pytestmark = pytest.mark.interop

TOLERANCE = 2e-5
TEXT = "Once upon a time a dragon met a cat."
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral, untied, top 3": {"tied_head": False, "top_k": 3},
    "mixtral, scaled and untied": {"tied_head": False, "scaled_embedding": True},
    "qwen3_moe": {"qk_norm": "head", "tied_head": False, "scaled_embedding": True, "top_k": 4},
    "qwen3_moe, top 1": {"qk_norm": "head", "top_k": 1},
    "qwen3_moe, plain gates": {"qk_norm": "head", "renormalise_gates": False},
    "qwen3_moe, grouped heads": {
        "qk_norm": "head",
        "kv_heads": 1,
        "head_size": 32,
        "rope_theta": 1e6,
        "norm_eps": 1e-5,
    },
    "mixtral, grouped heads": {"kv_heads": 2, "head_size": 8, "rope_theta": 1e5, "norm_eps": 1e-5},
    "olmoe": {"qk_norm": "full", "renormalise_gates": False, "norm_eps": 1e-5, "tied_head": False},
    "olmoe, grouped heads": {"qk_norm": "full", "kv_heads": 2},
    "ernie4_5_moe, grouped heads": {"balancing": "bias", "kv_heads": 2},
    "granitemoe, grouped heads": {"scaled_embedding": True, "kv_heads": 2},
    "ernie4_5_moe, bias": {"balancing": "bias"},
    "ernie4_5_moe, shared": {"shared_experts": 2},
    "ernie4_5_moe, both": {"balancing": "bias", "shared_experts": 1},
    "granitemoe": {"scaled_embedding": True},
    "llama": {"dense": "active"},
    "llama, grouped heads": {"dense": "active", "kv_heads": 2, "head_size": 32, "rope_theta": 5e5},
    "qwen3": {"dense": "total", "qk_norm": "head", "tied_head": False},
    "gpt2": {
        "dense": "active",
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "tied_head": False,
    },
}
ROUTING = ("top_k", "balancing", "renormalise_gates")
PRESETS = ("nano", "story", "story-cpu")
"""Their whole shape, with a small vocabulary and a shorter context."""


@pytest.fixture(params=[*CONFIGURATIONS, *PRESETS, *(f"{name}, dense" for name in PRESETS)], scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name, folder = request.param, tmp_path_factory.mktemp("run")
    preset_name, _, dense = name.partition(", ")
    if preset_name not in PRESETS:
        return name, save(folder, **CONFIGURATIONS[name])
    model = dataclasses.replace(preset(preset_name).model, seq_len=64, dense="active" if dense else "none")
    return name, save(folder, model=model)


def ours(run: Path) -> tuple[list[int], np.ndarray]:
    opened = moe_jax.load_run(run)
    return [opened.tokenizer.separator_id, *opened.tokenizer.encode(TEXT)], opened.logits(TEXT)


def compare(found: np.ndarray, expected: np.ndarray) -> None:
    """The logits agree, and so does the likeliest token everywhere."""
    difference = float(np.abs(found - expected).max())
    assert difference <= TOLERANCE
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_each_configuration_has_the_class_of_its_name(name: str) -> None:
    changes = dict(CONFIGURATIONS[name])
    routing = {key: changes.pop(key) for key in ROUTING if key in changes}
    start = dataclasses.replace(preset("nano").model, tie_value_output_init=False, qk_norm="none")
    model = dataclasses.replace(start, **changes).with_routing(**routing)
    assert architecture_of(model).model_type == name.partition(",")[0]


def test_transformers_gives_our_logits(run: tuple[str, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: --extra peers")
    transformers = pytest.importorskip("transformers")
    _, folder = run
    source = open_source(folder)
    export(source, "hf", "float32", tmp_path / "hf", "")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens, expected = ours(folder)
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0].numpy()
    compare(found, expected)


def test_llama_cpp_gives_our_logits(run: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = run
    source = open_source(folder)
    if architecture_of(source.config.model).gguf is None:
        pytest.skip(f"{name} is not held by llama.cpp")
    pytest.importorskip("gguf", reason="gguf is not installed: --extra gguf")
    gguf_file.write_gguf(tmp_path / "model.gguf", source, architecture_of(source.config.model), "test", "float32")
    tokens, expected = ours(folder)
    opened = LlamaCpp(tmp_path / "model.gguf", 64)
    assert opened.ids(TEXT) == tokens
    compare(opened.logits(tokens), expected)
