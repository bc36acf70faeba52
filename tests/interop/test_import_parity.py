"""Models that transformers has made go in: the same logits here, and the same tensors out again."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.config import UserError
from moe_jax.config.rope import scaled_rotation
from moe_jax.interop.export import export
from moe_jax.interop.huggingface import table
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.pretrained_shape import scaling_text
from moe_jax.interop.source import open_source
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import abstract_model, merge
from moe_jax.runs.arrays import named_leaves
from moe_jax.training.session import Session
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.made import LAYOUTS, by_transformers, text_file
from tests.support import short_form, tiny
from tests.support.commands import train_settings
from tests.support.hf_tokenizers import end_of, made
from tests.support.saved_run import quick_training

pytestmark = pytest.mark.interop

TOLERANCE = 2e-6
SHORT = (
    "llama, tied",
    "llama, linear",
    "llama, llama3",
    "llama, yarn",
    "qwen3",
    "mixtral",
    "qwen3_moe, tied",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "qwen2_moe",
)
TOKENS = [256, *b"Once upon a time a dragon met a cat."]
FLAGS = ("--steps", "1", "--batch-size", "2", "--seq-len", "64", "--precision", "float32", "--train.eval-every", "1")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("torch", reason="PyTorch is not installed: --extra peers")
    with quick_training(tmp_path_factory.mktemp("cache")):
        yield


def opened(folder: Path, tmp_path: Path, *flags: str) -> Session:
    words = [flags[0], str(folder), "--data", str(text_file(tmp_path)), "--out", str(tmp_path / "run"), *FLAGS]
    return Session.open(*train_settings(*words, *flags[1:]))


def logits(session: Session) -> np.ndarray:
    model = merge(session.programs.graphdef, session.state.params)
    return np.asarray(model.logits(model(jnp.asarray([TOKENS]), Mode.EVALUATE)[0])[0])


def theirs(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.float()(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("name", short_form(LAYOUTS, SHORT))
def test_the_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = by_transformers(tmp_path / "hf", name)
    found, expected = logits(opened(tmp_path / "hf", tmp_path, "--init-from")), theirs(model)
    difference = float(np.abs(found - expected).max())
    assert difference <= TOLERANCE
    assert np.abs(expected).max() > 0.5
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


GRADIENTS = ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "qwen2_moe"]


@pytest.mark.parametrize("name", short_form(GRADIENTS, ["olmoe", "granitemoe", "granitemoeshared", "qwen2_moe"]))
def test_the_gradients_are_those_of_pytorch(name: str, tmp_path: Path) -> None:
    """Of the mean cross-entropy, for every tensor. One that is in two of our parameters has the sum of both."""
    import torch

    model = by_transformers(tmp_path, name)
    opened = Pretrained.open(tmp_path, "--init-from")
    graphdef, shapes = abstract_model(opened.shape.model)
    tokens = 2 + tiny.tokens(2, 25, vocabulary=250)  # OLMoE's token 1, padding, has no gradient there

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        ours = merge(graphdef, params)
        hidden = ours(tokens[:, :-1], Mode.TRAIN)[0].reshape(-1, ours.config.width)
        return mean_cross_entropy(hidden, ours.head_matrix(), tokens[:, 1:].reshape(-1))

    ours = named_leaves(jax.jit(jax.grad(loss))(opened.params(shapes)[0], tokens))
    found: dict[str, np.ndarray] = {}
    for key, pieces in table(opened.shape, fused=True).items():
        for piece in pieces:
            whole, part = found.setdefault(piece.tensor, np.zeros(piece.shape)), np.asarray(ours[key])[piece.place]
            whole[piece.part] += piece.factor * (part.swapaxes(-1, -2) if piece.transposed else part)
    inputs, targets = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()
    torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    expected = {_on_disk(key): parameter.grad.numpy() for key, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    floor = 1e-5 * max(np.abs(gradient).max() for gradient in expected.values())
    for tensor, gradient in expected.items():
        assert tiny.relative_error(found[tensor], gradient, floor) < 1e-5, tensor


def _on_disk(name: str) -> str:
    """Granite's tensors have other names in memory."""
    if "block_sparse_moe" not in name:
        return name
    name = name.replace("experts.gate_up_proj", "input_linear.weight")
    return name.replace("experts.down_proj", "output_linear.weight").replace("router.weight", "router.layer.weight")


EXPORTS = [("llama, tied", "float32"), ("qwen2_moe", "bfloat16"), ("qwen3_moe, tied", "float16")]
EVERY_EXPORT = itertools.product(
    ("llama, tied", "qwen3", "mixtral", "qwen3_moe, tied", "olmoe", "qwen2_moe"), ("float32", "bfloat16", "float16")
)


@pytest.mark.parametrize(("name", "dtype"), short_form(EVERY_EXPORT, EXPORTS))
def test_an_export_gives_back_every_bit(name: str, dtype: str, tmp_path: Path) -> None:
    import ml_dtypes  # noqa: F401, teaches numpy bfloat16

    by_transformers(tmp_path / "hf", name, dtype)
    session = opened(tmp_path / "hf", tmp_path, "--init-from")
    session.save(0, 1.0)
    export(open_source(tmp_path / "run"), "hf", dtype, tmp_path / "out", "")  # pyright: ignore[reportArgumentType]
    there, here = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "out"))
    assert there.keys() == here.keys()
    for tensor, array in there.items():
        assert array.dtype == here[tensor].dtype
        assert array.tobytes() == here[tensor].tobytes(), tensor
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


OUT = [("granitemoe", "granitemoe"), ("granitemoeshared", "granitemoeshared"), ("llama, yarn", "llama")]


@pytest.mark.parametrize(("name", "kind"), OUT)
def test_multipliers_and_a_scaled_rotation_go_out_as_themselves(name: str, kind: str, tmp_path: Path) -> None:
    import transformers

    model = by_transformers(tmp_path / "hf", name, max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    session = opened(tmp_path / "hf", tmp_path, "--init-from")
    session.save(0, 1.0)
    export(open_source(tmp_path / "run"), "hf", "float32", tmp_path / "out", "")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert other.config.model_type == kind
    assert np.abs(theirs(other) - theirs(model)).max() <= TOLERANCE


@pytest.mark.parametrize("name", short_form(["mixtral", "qwen3_moe", "olmoe, tied", "qwen2_moe"], ["olmoe, tied"]))
def test_fused_experts_go_in_as_those_with_a_tensor_each(name: str, tmp_path: Path) -> None:
    """The names that transformers 5 has in memory."""
    model = by_transformers(tmp_path / "hf", name)
    plain = logits(opened(tmp_path / "hf", tmp_path, "--init-from"))
    state = {
        k: v.contiguous().numpy() for k, v in model.state_dict().items() if k != "lm_head.weight" or "tied" not in name
    }
    assert any("gate_up_proj" in tensor for tensor in state)
    save_file(state, tmp_path / "hf" / "model.safetensors")
    np.testing.assert_array_equal(logits(opened(tmp_path / "hf", tmp_path, "--init-from")), plain)


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTATIONS = {
    "Llama 3.1": (5e5, 128, LLAMA3 | {"original_max_position_embeddings": 8192}),
    "linear": (1e4, 64, {"rope_type": "linear", "factor": 2.5}),
    "Qwen3": (1e6, 128, YARN | {"factor": 4.0, "original_max_position_embeddings": 32768}),
    "mscale": (1e4, 64, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "no truncation": (1.5e5, 64, YARN | {"factor": 32.0, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}),
    "own size": (1e4, 64, YARN | {"factor": 2.0, "attention_factor": 1.5}),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_the_frequencies_of_scaled_rotations_are_those_of_transformers(name: str) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, width, rope = ROTATIONS[name]
    config = transformers.LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        max_position_embeddings=131072,
        rope_parameters=rope | {"rope_theta": theta},
    )
    expected, size = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    factors, found = scaled_rotation(scaling_text(rope, 131072), theta, width)
    plain = theta ** (-np.arange(0, width, 2) / width)
    np.testing.assert_allclose(plain * factors, expected.numpy(), rtol=2e-6)
    assert found == pytest.approx(size, rel=1e-12)
    assert max(np.abs(np.array(factors) - 1)) > 0.1


@pytest.mark.parametrize("dtype", short_form(["bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize("name", short_form(["qwen3", "granitemoe"], ["granitemoe"]))
def test_narrow_weights_widen_without_a_change(name: str, dtype: str, tmp_path: Path) -> None:
    """Their model is read again in float32: conversion in place rounds the frequencies of the rotation too."""
    import torch
    import transformers

    by_transformers(tmp_path / "hf", name, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert np.abs(logits(opened(tmp_path / "hf", tmp_path, "--init-from")) - theirs(model)).max() <= TOLERANCE


@pytest.mark.parametrize("name", short_form(["llama, tied", "qwen3"], ["qwen3"]))
def test_an_upcycled_model_starts_as_the_dense_one(name: str, tmp_path: Path) -> None:
    """Eight copies behind random routers; and its export is what transformers computes."""
    import transformers

    model = by_transformers(tmp_path / "hf", name)
    session = opened(tmp_path / "hf", tmp_path, "--upcycle", "--experts", "8", "--top-k", "2")
    assert session.config.model.experts == 8
    assert np.abs(logits(session) - theirs(model)).max() <= TOLERANCE
    routers = [np.asarray(b["ffn"]["router"]) for b in session.state.params["blocks"].values()]
    assert all(0.005 < r.std() < 0.05 for r in routers)  # 0.1 / sqrt(32)
    assert np.abs(routers[0] - routers[1]).max() > 0.01
    session.save(0, 1.0)
    export(open_source(tmp_path / "run"), "hf", "float32", tmp_path / "out", "")
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert np.abs(theirs(grown) - theirs(model)).max() <= TOLERANCE


KINDS = ["gpt2", "smollm", "qwen", "llama3", "llama2", "metaspace", "olmo"]


@pytest.mark.parametrize("kind", short_form(KINDS, ["smollm", "llama3", "llama2"]))
def test_an_imported_tokenizer_reads_as_in_transformers_and_llama_cpp(kind: str, tmp_path: Path) -> None:
    """llama.cpp, where it has a name for the rule."""
    import transformers

    file = made(kind)
    size = max(json.loads(file)["model"]["vocab"].values()) + 3
    by_transformers(tmp_path / "hf", "llama, tied", config={"vocab_size": size, "eos_token_id": end_of(file)})
    (tmp_path / "hf" / "tokenizer.json").write_text(file)
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    session = opened(tmp_path / "hf", tmp_path, "--init-from")
    session.save(0, 1.0)
    source = open_source(tmp_path / "run")
    export(source, "hf", "float32", tmp_path / "out", "")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == file
    text = "Once upon a time they'll eat 1234 cakes.\n\n   na\u00efve \u65e5\u672c \U0001f600"
    ours = source.tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours
    if kind in ("llama2", "metaspace"):
        with pytest.raises(UserError, match=r"--to gguf: llama.cpp has no name for the rule"):
            export(source, "gguf", "float32", tmp_path / "gguf", "")
        assert not (tmp_path / "gguf").exists()
        return
    export(source, "gguf", "float32", tmp_path / "gguf", "")
    assert LlamaCpp(tmp_path / "gguf" / "model.gguf", 64).ids(text) == [source.tokenizer.separator_id, *ours]
