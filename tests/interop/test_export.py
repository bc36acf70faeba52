"""What an export writes, what it refuses in one line, and that a failure leaves nothing."""

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import moe_jax.interop.export as module
from moe_jax.cli import main
from moe_jax.config import UserError
from moe_jax.config.presets import preset
from moe_jax.interop import html
from moe_jax.interop.architectures import architecture_of
from moe_jax.interop.export import export
from moe_jax.interop.gguf_file import CONTROL, NORMAL, _kind, gguf_vocabulary
from moe_jax.interop.source import open_source
from tests.interop.saved import save
from tests.support.commands import refused as refused_command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), layers=1)


def command(*arguments: str) -> int:
    return main.main(main.run_command, ["export", *arguments])


HELD = {
    *("vocab_size", "seq_len", "layers", "width", "heads", "kv_heads", "head_size", "experts", "expert_hidden"),
    *("shared_experts", "dense", "activation", "norm", "norm_eps", "positions", "rope_theta", "bias", "qk_norm"),
    *(
        "shared_gate",
        "qkv_bias",
        "rope_scaling",
        "tied_head",
        "scaled_embedding",
        "embedding_multiplier",
        "attention_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "routing",
        "top_k",
        "balancing",
        "renormalise_gates",
    ),
}
"""Settings that change what a model computes: an export writes each, or refuses it."""
ONLY_TRAINING = {
    *("tie_value_output_init", "zero_init_residual", "dropout", "attention_dropout"),
    *("capacity_factor", "dispatch", "device_capacity_factor"),
}
"""Settings of the start, of random numbers, and of dropping: an exported model drops nothing, and its card says so."""


def test_every_setting_of_a_model_is_known_to_the_export() -> None:
    """A new one that changes the forward pass would be left out without a word, and the export would compute another
    function. Write or refuse it in `interop/architectures.py`, then name it above."""
    model = preset("nano").model
    names = {field.name for part in (model, model.routing) for field in dataclasses.fields(part)}
    assert names == HELD | ONLY_TRAINING


GPT2 = {"dense": "active", "norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True}


@pytest.mark.parametrize(
    ("changes", "routing", "class_name", "gguf"),
    [
        ({}, {}, "MixtralForCausalLM", "llama"),
        ({"head_size": 8}, {}, "MixtralForCausalLM", "llama"),
        ({"qk_norm": "head"}, {}, "Qwen3MoeForCausalLM", "qwen3moe"),
        ({"qk_norm": "head"}, {"renormalise_gates": False}, "Qwen3MoeForCausalLM", None),
        ({"qk_norm": "head"}, {"top_k": 1}, "Qwen3MoeForCausalLM", None),
        ({"qk_norm": "full"}, {}, "OlmoeForCausalLM", None),
        ({"qk_norm": "full"}, {"renormalise_gates": False}, "OlmoeForCausalLM", "olmoe"),
        ({"qk_norm": "full"}, {"top_k": 1}, "OlmoeForCausalLM", "olmoe"),
        ({"scaled_embedding": True, "tied_head": False}, {}, "MixtralForCausalLM", "llama"),
        ({"scaled_embedding": True}, {}, "GraniteMoeForCausalLM", "granitemoe"),
        ({}, {"balancing": "bias"}, "Ernie4_5_MoeForCausalLM", "ernie4_5-moe"),
        ({"dense": "active"}, {}, "LlamaForCausalLM", "llama"),
        ({"dense": "active", "qk_norm": "head"}, {}, "Qwen3ForCausalLM", "qwen3"),
        (GPT2 | {"kv_heads": 0}, {}, "GPT2LMHeadModel", None),
    ],
)
def test_the_class_of_each_kind_of_model(changes: dict, routing: dict, class_name: str, gguf: str | None) -> None:
    """And llama.cpp's architecture; None where it computes something else."""
    start = dataclasses.replace(preset("nano").model, tie_value_output_init=False, qk_norm="none", tied_head=True)
    found = architecture_of(dataclasses.replace(start, **changes).with_routing(**routing))
    assert (found.class_name, found.gguf) == (class_name, gguf)
    assert bool(found.gguf_problem) == (gguf is None)
    if gguf is None and "top_k" in routing:
        assert found.gguf_problem.startswith("--top-k 1")


@pytest.mark.parametrize(
    ("changes", "routing", "options"),
    [
        ({"bias": True}, {}, "--model.bias True"),
        ({"activation": "gelu"}, {}, "--model.activation gelu"),
        ({"positions": "learned"}, {}, "--model.positions learned"),
        ({"qkv_bias": True}, {}, "--model.qkv-bias True"),
        ({"qk_norm": "head"}, {"balancing": "bias"}, "--model.qk-norm head, --routing.balancing bias"),
        ({"qk_norm": "full", "head_size": 8}, {}, "--model.qk-norm full, --model.head-size 8"),
        ({"qk_norm": "full", "dense": "active"}, {}, "--model.qk-norm full, --model.dense active"),
        ({"qk_norm": "full", "shared_experts": 1}, {}, "--model.qk-norm full, --model.shared-experts 1"),
        ({"shared_experts": 1, "shared_gate": True, "qk_norm": "head"}, {}, "--model.qk-norm head, --model.shared"),
        ({"shared_experts": 1}, {"renormalise_gates": False}, "--model.shared-experts 1, --routing.renormalise-gates"),
        ({"shared_experts": 1, "head_size": 8}, {}, "--model.head-size 8, --model.shared-experts 1"),
        ({}, {"top_k": 1}, "--top-k 1"),
        ({}, {"renormalise_gates": False}, "--routing.renormalise-gates False"),
        ({"scaled_embedding": True, "qk_norm": "head"}, {}, "--model.qk-norm head, --model.scaled-embedding True"),
        ({"scaled_embedding": True, "dense": "active"}, {}, "--model.dense active, --model.scaled-embedding True"),
        ({"logits_scaling": 2.0, "dense": "active"}, {}, "--model.dense active, --model.logits-scaling 2.0"),
        ({"scaled_embedding": True}, {"top_k": 1}, "--model.scaled-embedding True, --top-k 1"),
        ({"dense": "active", "norm": "layernorm"}, {}, "--model.norm layernorm, --model.dense active"),
        (GPT2 | {"kv_heads": 1}, {}, "--model.norm layernorm, --model.positions learned, --model.activation gelu"),
        (GPT2 | {"head_size": 8, "kv_heads": 0}, {}, "--model.norm layernorm, --model.positions learned"),
    ],
)
def test_what_no_class_holds_is_blamed_on_its_settings(changes: dict, routing: dict, options: str) -> None:
    start = dataclasses.replace(preset("nano").model, tie_value_output_init=False, qk_norm="none", tied_head=True)
    model = dataclasses.replace(start, **changes).with_routing(**routing)
    with pytest.raises(UserError) as failure:
        architecture_of(model)
    assert str(failure.value).startswith(options)
    assert "`--to safetensors`" in str(failure.value)


def test_a_folder_for_transformers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--run", str(run), "--out", str(tmp_path / "out")) == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-6, 10_000.0, 16)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 256, "do_sample": True, "temperature": 0.8}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_gguf_pads_the_vocabulary_and_keeps_rows_that_no_block_fills(run: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    words = gguf_vocabulary(open_source(run).tokenizer, 259)
    assert (words.words[-2:], words.kinds[-4:]) == (
        ["<|unused_257|>", "<|unused_258|>"],
        [NORMAL, CONTROL, CONTROL, CONTROL],
    )
    kinds = [
        _kind(name, np.zeros(shape), "q8_0").name for name, shape in (("w", (2, 64)), ("w", (2, 48)), ("w", (64,)))
    ]
    assert kinds == ["Q8_0", "F16", "F32"]
    assert _kind("blk.0.ffn_gate_inp.weight", np.zeros((2, 64)), "bfloat16") == gguf.GGMLQuantizationType.F32


def test_plain_safetensors_have_our_names_and_values(run: Path, tmp_path: Path) -> None:
    assert command("--run", str(run), "--out", str(tmp_path / "out"), "--to", "safetensors") == 0
    found, source = load_file(tmp_path / "out" / "model.safetensors"), open_source(run)
    assert found.keys() == source.weights.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, source.weights[name])
    layout = (tmp_path / "out" / "LAYOUT.md").read_text()
    assert all(name.split(".")[-1] in layout for name in found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_the_rounded_ones(dtype: str, run: Path, tmp_path: Path) -> None:
    import ml_dtypes

    export(open_source(run), "hf", dtype, tmp_path / "out", "")  # pyright: ignore[reportArgumentType]
    export(open_source(run), "hf", "float32", tmp_path / "wide", "")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "out"))
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    for name, array in wide.items():
        np.testing.assert_array_equal(narrow[name], array.astype(kind))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


# Faults


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "model_card", full)  # the last thing that is written
    with pytest.raises(UserError, match=r"the disk is full\); nothing was exported"):
        export(open_source(run), "hf", "float32", tmp_path / "deep" / "out", "")
    assert list((tmp_path / "deep").iterdir()) == []
    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda p, **given: full() if p.suffix == ".partial" else mkdir(p, **given))
    with pytest.raises(UserError, match=r"the disk is full\); nothing was exported"):
        export(open_source(run), "hf", "float32", tmp_path / "deep" / "out", "")


def test_a_page_is_whole_or_absent_and_a_run_that_it_cannot_hold_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ["--run", str(run), "--to", "html", "--out", str(tmp_path / "deep" / "page.html")]
    found = html.find_checkpoint(run)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def refused(status: int, said: str) -> None:
        assert command(*page) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert not (tmp_path / "deep").exists()

    with monkeypatch.context() as patch:
        patch.setattr(html, "write_output", full)
        refused(1, "cannot be written (the disk is full); nothing was exported")
        patch.setattr(html, "saved_weights", lambda _: "int4")
        refused(2, "its weights are int4, and a page holds int8")
        patch.setattr(html, "find_checkpoint", lambda *_: setattr(found.tokenizer, "kind", "gpt2") or found)
        refused(2, "--to html: the page has no gpt2 tokenizer")
    assert command(*page) == 0
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_not_exported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path, layers=1)
    (file,) = (run / "checkpoints").glob(f"*/{name}")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert command("--run", str(run), "--out", str(tmp_path / "out")) == 1
    *skipped, error = capsys.readouterr().err.splitlines()
    assert len(skipped) == 1
    assert error.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "q8_0"], "--dtype q8_0: for --to gguf only"),
        (["--to", "onnx"], "invalid choice 'onnx'"),
        (["--step", "7"], "--step 7: "),
        (["--out", "full"], "is not empty; name a new folder"),
        (["--to", "html", "--out", "full"], "--out full: is a folder; name a file"),
        (["--to", "html", "--out", "page"], "--out page: is there already; name a new file"),
        (["--to", "html", "--dtype", "bfloat16"], "--dtype bfloat16: the weights of a page are int8"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(
    arguments: list[str],
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    (here / "full" / "x").mkdir(parents=True)
    (here / "page").touch()
    monkeypatch.chdir(here)
    for name in ("source.open_source", "html.write_html"):
        monkeypatch.setattr(f"moe_jax.interop.{name}", lambda *_: pytest.fail("read"))
    assert said in refused_command(["export", "--run", str(run), "--out", str(tmp_path / "out"), *arguments], capsys)
    assert not (tmp_path / "out").exists()
