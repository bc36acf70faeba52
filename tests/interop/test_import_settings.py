"""What is typed beside --init-from and --upcycle: the folder gives the shape, and how it is trained is free."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_jax
from moe_jax.config import RunConfig
from moe_jax.interop.export import export
from moe_jax.interop.source import open_source
from moe_jax.runs.catalog import load_config
from moe_jax.training.session import Session
from moe_jax.training.start import IMPORTED_LR
from tests.interop.made import EXPERTS, llama, text_file
from tests.support.commands import refusal, train_settings
from tests.support.saved_run import quick_training

MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, **EXPERTS}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model `hf` and text.txt, which is the present one."""
    llama(tmp_path / "hf")
    text_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(*argv: str) -> RunConfig:
    return train_settings(*argv)[0]


def test_the_shape_is_the_folders_and_the_training_the_presets(place: Path) -> None:
    config = parsed("--init-from", "hf", "--preset", "story", "--data", "text.txt", "--steps", "7")
    model = config.model
    assert (model.vocab_size, model.width, model.layers, model.heads, model.kv_heads) == (260, 32, 2, 4, 2)
    assert (model.dense, model.dense_hidden, model.tied_head, model.seq_len) == ("active", 48, True, 64)
    assert (config.train.steps, config.train.optimizer, config.train.lr) == (7, "adamw", IMPORTED_LR)
    assert config.train.batch_size == 16
    assert (config.data.tokenizer, config.run_dir) == ("hf", "runs/story-imported")
    assert parsed("--init-from", "hf", "--optimizer", "muon", "--lr", "1", "--seq-len", "9").model.seq_len == 9


def test_experts_go_in_without_drops(place: Path) -> None:
    values = json.loads((place / "hf" / "config.json").read_text())
    (place / "hf" / "config.json").write_text(json.dumps(values | MIXTRAL))
    model = parsed("--init-from", "hf").model
    assert (model.experts, model.routing.top_k, model.expert_hidden, model.dropless) == (4, 2, 48, True)
    asked = ("--dispatch", "capacity", "--capacity-factor", "2", "--model.dropout", "0.1")
    assert parsed("--init-from", "hf", *asked).model.capacity == 64
    for flags, said in (
        (["--top-k", "1"], "--top-k 1: must stay 2 with the model in hf; leave the flag out"),
        (["--routing.no-renormalise-gates"], "--routing.renormalise-gates False: must stay True with the model in hf"),
        (["--routing.balancing", "bias"], "--routing.balancing bias: must stay loss with the model in hf"),
        (["--experts", "8"], "--experts 8: must stay 4 with the model in hf"),
        (["--model.shared-experts", "1"], "--model.shared-experts 1: must stay 0 with the model in hf"),
    ):
        assert refusal(parsed, "--init-from", "hf", *flags).startswith(said)
    assert "--upcycle hf: has experts already; start from it with --init-from" in refusal(parsed, "--upcycle", "hf")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--model.width", "64"], ["--model.width 64", "stay 32 "]),
        (["--model.rope-theta", "1e6"], ["--model.rope-theta 1000000.0", "stay 10000.0 "]),
        (["--model.no-tied-head"], ["--model.tied-head False", "stay True "]),
        (["--model.dense", "none"], ["--model.dense none", "stay active ", "use --upcycle"]),
        (["--experts", "4"], ["--experts 4", "stay 1 ", "use --upcycle"]),
        (["--seq-len", "65"], ["--seq-len 65", "reads 64 positions at most"]),
        (["--tokenizer", "bpe"], ["--tokenizer bpe", "stay hf "]),
        (["--upcycle", "hf"], ["--init-from hf", "--upcycle hf", "give one"]),
    ],
    ids=lambda x: " ".join(x)[:30],
)
def test_flags_that_contradict_the_folder(place: Path, flags: list[str], names: list[str]) -> None:
    said = refusal(parsed, "--init-from", "hf", *flags)
    assert all(name in said for name in names), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.width", "64"], "--model.width 64: must stay 32 with the dense model in hf"),
        (["--seq-len", "65"], "--seq-len 65: the dense model in hf reads 64 positions at most"),
        (["--model.dense", "active"], "--model.dense active: must stay "),
    ],
)
def test_what_a_dense_model_cannot_be_upcycled_to(place: Path, flags: list[str], said: str) -> None:
    assert refusal(parsed, "--upcycle", "hf", *flags).startswith(said)


def test_an_upcycled_model_has_the_experts_of_the_preset(place: Path) -> None:
    model = parsed("--upcycle", "hf", "--seq-len", "32").model
    assert (model.dense, model.experts, model.routing.top_k, model.expert_hidden) == ("none", 8, 2, 48)
    assert (model.seq_len, model.kv_heads) == (32, 2)
    assert "--upcycle nowhere: no run with a complete checkpoint there" in refusal(parsed, "--upcycle", "nowhere")


# Runs


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `hf`, text.txt, and the run `run`, which is saved before its first step."""
    place = tmp_path_factory.mktemp("place")
    with quick_training(tmp_path_factory.mktemp("cache"), samples=False):
        llama(place / "hf")
        words = ["--init-from", str(place / "hf"), "--data", str(text_file(place)), "--out", str(place / "run")]
        session = Session.open(*train_settings(*words, "--seq-len", "32", "--precision", "float32"))
        session.save(0, 1.0)
        yield place


def test_a_run_says_where_it_comes_from(imported: Path) -> None:
    place = imported
    document = json.loads((place / "run" / "config.json").read_text())
    assert document["init_from"] == str(place / "hf")
    (origin,) = document["history"]
    assert (origin["initialised_from"], origin["model_type"]) == (str(place / "hf"), "llama")
    assert len(origin["digest"]) == 32


def test_a_resume_needs_no_folder_and_takes_no_other(imported: Path, tmp_path: Path) -> None:
    place = imported
    run, folder = tmp_path / "run", str(place / "hf")
    shutil.copytree(place / "run", run)
    (place / "hf").rename(place / "gone")
    try:
        for given in ([], ["--init-from", folder]):
            config, start = train_settings("--out", str(run), "--resume", "--steps", "6", *given)
            assert start.saved is not None
            assert config.init_from == folder
        session = Session.open(config, start)
        assert (session.resumed_from, session.origin is None) == (0, False)
        resumed = ("--out", str(run), "--resume")
        said = refusal(train_settings, *resumed, "--init-from", "other")
        assert said.startswith("--init-from other: must stay ")
        assert "leave the flag out" in said
        assert "--upcycle other" in refusal(train_settings, *resumed, "--upcycle", "other")
    finally:
        (place / "gone").rename(place / "hf")


def test_the_library_and_an_export_take_the_run(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = imported
    run = moe_jax.load_run(place / "run")
    assert run.tokenizer.kind == "hf"
    assert run.logits("Once").shape == (len(run.tokenizer.encode("Once")) + 1, 260)
    export(open_source(place / "run"), "hf", "float32", tmp_path / "out", "")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (place / "hf" / "tokenizer.json").read_bytes()
    again = parsed("--init-from", str(tmp_path / "out"))
    saved = load_config(place / "run")
    assert saved is not None
    assert again.model == dataclasses.replace(saved.model, seq_len=32)
