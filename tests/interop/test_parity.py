"""The same logits here, in transformers and in llama.cpp, for every architecture of the table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_jax
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
    "qwen3_moe": {"qk_norm": True, "tied_head": False, "scaled_embedding": True, "top_k": 4},
    "qwen3_moe, top 1": {"qk_norm": True, "top_k": 1},
    "ernie4_5_moe, bias": {"balancing": "bias"},
    "ernie4_5_moe, shared": {"shared_experts": 2},
    "ernie4_5_moe, both": {"balancing": "bias", "shared_experts": 1},
    "granitemoe": {"scaled_embedding": True},
    "llama": {"dense": "active"},
    "qwen3": {"dense": "total", "qk_norm": True, "tied_head": False},
    "gpt2": {
        "dense": "active",
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "tied_head": False,
    },
}


@pytest.fixture(params=CONFIGURATIONS, scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save(tmp_path_factory.mktemp("run"), **CONFIGURATIONS[request.param])


def ours(run: Path) -> tuple[list[int], np.ndarray]:
    opened = moe_jax.load_run(run)
    return [opened.tokenizer.separator_id, *opened.tokenizer.encode(TEXT)], opened.logits(TEXT)


def test_transformers_gives_our_logits(run: tuple[str, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: --extra peers")
    transformers = pytest.importorskip("transformers")
    name, folder = run
    source = open_source(folder)
    assert architecture_of(source.config.model).model_type == name.partition(",")[0]
    export(source, "hf", "float32", tmp_path / "hf", "")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens, expected = ours(folder)
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(found - expected).max() <= TOLERANCE
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


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
    found = opened.logits(tokens)
    assert np.abs(found - expected).max() <= TOLERANCE
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
