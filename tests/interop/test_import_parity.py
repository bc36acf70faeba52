"""Models that transformers has made go in: the same logits here, and the same tensors out again."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.cli.train import Train
from moe_jax.config import UserError
from moe_jax.interop.export import export
from moe_jax.interop.source import open_source
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.training.session import Session
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.made import LAYOUTS, by_transformers, text_file
from tests.support import short_form
from tests.support.hf_tokenizers import end_of, made
from tests.support.saved_run import quick_training

pytestmark = pytest.mark.interop

TOLERANCE = 2e-5
TOKENS = [256, *b"Once upon a time a dragon met a cat."]
FLAGS = ("--steps", "1", "--batch-size", "2", "--seq-len", "64", "--precision", "float32", "--train.eval-every", "1")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("torch", reason="PyTorch is not installed: --extra peers")
    with quick_training(tmp_path_factory.mktemp("cache")):
        yield


def opened(folder: Path, tmp_path: Path, *flags: str) -> Session:
    words = [flags[0], str(folder), "--data", str(text_file(tmp_path)), "--out", str(tmp_path / "run"), *FLAGS]
    return Session.open(*Train.parse([*words, *flags[1:]]).settings)


def logits(session: Session) -> np.ndarray:
    model = merge(session.programs.graphdef, session.state.params)
    return np.asarray(model.logits(model(jnp.asarray([TOKENS]), Mode.EVALUATE)[0])[0])


def theirs(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.float()(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("name", short_form(LAYOUTS, ("llama, tied", "qwen3", "mixtral", "qwen3_moe, tied", "olmoe")))
def test_the_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = by_transformers(tmp_path / "hf", name)
    found, expected = logits(opened(tmp_path / "hf", tmp_path, "--init-from")), theirs(model)
    difference = float(np.abs(found - expected).max())
    assert difference <= TOLERANCE
    assert np.abs(expected).max() > 0.5
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


EXPORTS = [("llama, tied", "float32"), ("mixtral", "bfloat16"), ("qwen3_moe, tied", "float16")]
EVERY_EXPORT = itertools.product(
    ("llama, tied", "qwen3", "mixtral", "qwen3_moe, tied", "olmoe"), ("float32", "bfloat16", "float16")
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


@pytest.mark.parametrize("name", short_form(["mixtral", "qwen3_moe", "olmoe, tied"], ["olmoe, tied"]))
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


@pytest.mark.parametrize("dtype", short_form(["bfloat16", "float16"], ["bfloat16"]))
def test_narrow_weights_widen_without_a_change(dtype: str, tmp_path: Path) -> None:
    """Their model is read again in float32: conversion in place rounds the frequencies of the rotation too."""
    import torch
    import transformers

    by_transformers(tmp_path / "hf", "qwen3", dtype)
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
