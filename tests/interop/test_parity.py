"""The same logits here, in transformers and in llama.cpp, for each architecture; the same text of a trained model."""

import dataclasses
import json
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
from tests.reliability import runs
from tests.support import short_form

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
    "qwen2_moe": {"shared_experts": 2, "shared_gate": True, "qkv_bias": True, "renormalise_gates": False},
    "qwen2_moe, without biases": {"shared_experts": 1, "shared_gate": True, "kv_heads": 2, "head_size": 32},
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


SHORT = {
    *("mixtral, untied, top 3", "qwen3_moe", "qwen3_moe, grouped heads", "olmoe", "ernie4_5_moe, both", "granitemoe"),
    "qwen2_moe",
    *("llama, grouped heads", "qwen3", "gpt2", "nano"),
}
"""Each architecture once. The other cases are for the night."""
RUNS = short_form((*CONFIGURATIONS, *PRESETS, *(f"{name}, dense" for name in PRESETS)), SHORT)


@pytest.fixture(params=RUNS, scope="module")
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


def test_each_configuration_has_the_class_of_its_name() -> None:
    start = dataclasses.replace(preset("nano").model, tie_value_output_init=False, qk_norm="none")
    for name, settings in CONFIGURATIONS.items():
        routing = {key: value for key, value in settings.items() if key in ROUTING}
        changes = {key: value for key, value in settings.items() if key not in ROUTING}
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


# A model that was trained: the same greedy text everywhere, and what 8 bits a weight cost


SETTINGS = ("--model.width", "64", "--model.layers", "2", "--model.seq-len", "128", "--model.expert-hidden", "64")
SETTINGS += ("--data.stories", "400", "--data.vocab-size", "512", "--batch-size", "4", "--train.eval-every", "100")
SETTINGS += ("--execution.compute-dtype", "float32", "--steps", "120")
PROMPT, GREEDY = "Once upon a time", 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = runs.complete([*SETTINGS, "--out", str(folder / "run")], tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr
    source = open_source(folder / "run")
    export(source, "hf", "float32", folder / "hf", "")
    return folder


def greedy(folder: Path) -> list[int]:
    """Our 100 likeliest tokens after the prompt, the separator and the prompt first."""
    run = moe_jax.load_run(folder / "run")
    tokens = [run.tokenizer.separator_id, *run.tokenizer.encode(PROMPT)]
    text = run.generate(PROMPT, temperature=0, max_tokens=GREEDY)
    return [*tokens, *run.tokenizer.encode(text)[len(tokens) - 1 :]]


def test_transformers_writes_the_same_text(trained: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: --extra peers")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    ids = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=GREEDY, do_sample=False)[0]
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert text == moe_jax.load_run(trained / "run").generate(PROMPT, temperature=0, max_tokens=GREEDY)
    assert len(written) > 40
    assert torch.isfinite(model(**ids).logits).all()


def test_llama_cpp_writes_the_same_tokens(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: --extra gguf")
    source = open_source(trained / "run")
    export(source, "gguf", "float32", tmp_path / "x", "")
    opened = LlamaCpp(tmp_path / "x" / "model.gguf", 128)
    start = opened.ids(PROMPT)
    expected = moe_jax.load_run(trained / "run").generate(PROMPT, temperature=0, max_tokens=GREEDY)
    found = opened.greedy(start, GREEDY)
    if source.tokenizer.separator_id in found:
        found = found[: found.index(source.tokenizer.separator_id)]
    assert PROMPT + source.tokenizer.decode(found) == expected
    assert len(found) > 40


def test_eight_bits_a_weight_cost_less_than_a_five_hundredth(trained: Path, tmp_path: Path) -> None:
    """The loss on the same 20 windows of validation text."""
    pytest.importorskip("gguf", reason="gguf is not installed: --extra gguf")
    source = open_source(trained / "run")
    run = moe_jax.load_run(trained / "run")
    tokens = run.validation_text(progress=False)[0].valid.tokens
    windows = [list(map(int, tokens[i : i + 128])) for i in range(0, 20 * 128, 128)]
    losses = {}
    for dtype in ("float32", "q8_0"):
        export(source, "gguf", dtype, tmp_path / dtype, "")
        opened = LlamaCpp(tmp_path / dtype / "model.gguf", 128)
        losses[dtype] = np.mean([loss(opened.logits(window), window) for window in windows])
    assert abs(losses["q8_0"] / losses["float32"] - 1) <= 0.002
    small, large = ((tmp_path / d / "model.gguf").stat().st_size for d in ("q8_0", "float32"))
    assert small < 0.4 * large


def loss(logits: np.ndarray, tokens: list[int]) -> float:
    """Mean nats of each token after the first."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(-1, keepdims=True)
    log_total = top[:, 0] + np.log(np.exp(wide - top).sum(-1))
    return float(np.mean(log_total - wide[np.arange(len(wide)), tokens[1:]]))


def test_the_card_tells_of_the_run(trained: Path) -> None:
    card = (trained / "hf" / "README.md").read_text()
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert f"{summary['val_bits_per_byte']:.4f} bits per byte" in card
    assert f"{summary['params_total']:,}, of which {summary['params_active']:,} are active" in card
