"""`python -m foundation run`: a run of the real model, and its loss and its text by the hand-derived code.

The two packages share no line of code. Here their results on one run are compared.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from foundation.__main__ import main
from foundation.losses import IGNORE
from foundation.trained import Problem, tokens, validation, weights
from foundation.trained import run as by_hand
from moe_jax.config import DataConfig
from moe_jax.config.presets import preset
from moe_jax.data.batches import evaluation_windows
from moe_jax.data.corpora import open_corpus
from moe_jax.data.tokenizers import train_tokenizer
from moe_jax.inference.decode import TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.runs.arrays import SafetensorsWriter
from moe_jax.runs.load import open_run
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from tests.support import saved_run, short_form

LLAMA3 = json.dumps(
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 16}
)
SHAPES: dict[str, dict[str, object]] = {
    "nano": {"layers": 1},
    "grouped keys, layernorm, biases, learned positions, untied and scaled": {
        "kv_heads": 1, "norm": "layernorm", "bias": True, "positions": "learned", "tied_head": False,
        "scaled_embedding": True, "activation": "gelu", "qk_norm": "head",
    },
    "shared experts in two layers, pairs slowed": {"shared_experts": 2, "rope_scaling": LLAMA3},
    "slowed by one factor": {"layers": 1, "rope_scaling": '{"rope_type": "linear", "factor": 3.0}'},
    "a dense twin": {"dense": "active"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    """`main` turns float64 on; put back afterwards."""
    before = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.runs
@pytest.mark.parametrize("shape", short_form(SHAPES, [*SHAPES][1:3]))
def test_loss_and_story_are_those_of_the_real_model(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved_run.save_run(tmp_path, **SHAPES[shape])
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    run = open_run(folder, None)
    valid = run.validation_text(progress=False)[0].valid.tokens
    step, seq_len = make_evaluation_step(run.graphdef), run.config.model.seq_len
    real = evaluate(step, run.params, valid, seq_len=seq_len, token_bytes=run.tokenizer.token_bytes())
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"val_loss": real.loss, "val_whole_stream": True, "best_step": saved_run.STEP, "precision": "float32"}
    (folder / "summary.json").write_text(json.dumps(summary))
    generator = TextGenerator(run.writer, run.params, run.tokenizer, seq_len)
    pieces = "".join(generator.pieces("A cat", Sampling(temperature=0.0), seed=0, limit=30))  # past the context of 16

    assert main(["run", str(folder), "--prompt", "A cat", "--max-tokens", "30"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(said["val_loss"] - real.loss) <= 1e-6
    assert said["difference"] <= 1e-6
    assert said["tokens"] == real.tokens
    assert said["text"] == pieces

    summary["val_loss"] += 2e-6  # and it can fail
    (folder / "summary.json").write_text(json.dumps(summary))
    assert main(["run", str(folder), "--max-tokens", "1"]) == 1
    assert "NOT the same" in capsys.readouterr().out


@pytest.mark.parametrize(("length", "stream"), [(16, 61), (16, 17), (16, 9), (7, 40), (2, 12), (16, 2)])
def test_windows_count_each_token_once_with_the_context_of_the_real_ones(length: int, stream: int) -> None:
    ids = np.arange(100, 100 + stream)  # each token says its own position
    ours = []
    for window, targets in validation.windows(ids, length):
        ours += [(int(window[0]), int(t)) for t in targets if t != IGNORE]
    theirs = []
    for batch in evaluation_windows(ids, seq_len=length, batch_size=3):
        for row, weight in enumerate(batch.weights):
            theirs += [(int(batch.inputs[row, 0]), int(t)) for t in batch.targets[row][weight > 0]]
    assert sorted(ours) == sorted(theirs)
    assert sorted(target for _, target in ours) == list(ids[1:])


TEXTS = ["Once upon a time, the cat's hat wasn't red.",
         "  two  spaces\n\nand lines \t\n", "ünï 漢字 ½ x² 😀 don't 42nd",
         "", " ", "a\u00a0b\u2003c  ", "'S 'll it's 're'", "x" * 50 + "\x1c y"]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_the_tokenizer_is_the_run_s(kind: Literal["bpe", "byte"], tmp_path: Path) -> None:
    documents = open_corpus(DataConfig(stories=200)).documents("train")
    real = train_tokenizer(DataConfig(tokenizer=kind, vocab_size=400), documents)
    real.save(tmp_path / "tokenizer.json")
    ours = tokens.read_vocabulary(tmp_path / "tokenizer.json")
    assert (ours.size, ours.separator) == (real.vocab_size, real.separator_id)
    for text in TEXTS:
        ids = real.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode([*ids, ours.separator]) == real.decode([*ids, real.separator_id])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run.save_run(tmp_path_factory.mktemp("run"), layers=1)


def test_what_cannot_be_read_is_said_in_one_line(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "empty"))
    (tmp_path / "no.txt").write_text(" ")
    for arguments, said in (
        ([str(tmp_path / "nowhere")], "cannot be read"),
        ([str(saved)], "does not hold the run's validation tokens"),
        ([str(saved), "--text", str(tmp_path / "no.txt")], "holds no text"),
        ([str(saved), "--text", str(tmp_path / "gone.txt")], "cannot be read"),
    ):
        assert main(["run", *arguments]) == 1
        out, err = capsys.readouterr()
        assert said in err
        assert (out, err.count("\n")) == ("", 1)


def test_a_text_of_ones_own_is_scored(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("A cat.<|endoftext|>A dog.\n<|endoftext|>\n")
    assert main(["run", str(saved), "--text", str(tmp_path / "own.txt"), "--max-tokens", "1"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["tokens"] == 2 * (6 + 1)
    assert said["difference"] is None


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    """Runs that are imported or trained in bfloat16 have such weights."""
    values = jax.random.normal(jax.random.key(0), (5, 3), "bfloat16")
    with SafetensorsWriter(tmp_path / "weights.safetensors", {"head": values}) as file:
        file.add(np.asarray(values))
    found = weights.read_safetensors(tmp_path / "weights.safetensors")
    assert found["head"].dtype == np.float64
    np.testing.assert_array_equal(found["head"], np.asarray(values, np.float64))


def test_what_is_not_derived_is_refused() -> None:
    model = {"experts": 4, "heads": 2, "norm": "rmsnorm", "positions": "rope"}
    yarn = {"rope_scaling": '{"rope_type": "yarn"}'}
    for further, routing in (({}, {"balancing": "bias"}), ({}, {"eval_capacity_factor": 1.0}), (yarn, {})):
        with pytest.raises(Problem, match="the run"):
            weights.config_of({**model, **further}, {"top_k": 2, **routing})


def test_every_setting_of_a_model_is_read_refused_or_known_to_change_nothing() -> None:
    """A new setting that changes the forward pass must be named in `weights.py`, or the run is refused."""
    model = preset("nano").model
    names = [field.name for part in (model, model.routing) for field in dataclasses.fields(part)]
    groups = (weights.SHAPES, weights.READ, weights.MULTIPLIERS, weights.ONLY_TRAINING)
    assert sorted(names) == sorted(name for group in groups for name in group)
    weights.config_of(dataclasses.asdict(model), dataclasses.asdict(model.routing))
    with pytest.raises(weights.Problem, match="Granite's multipliers, which are not derived"):
        weights.config_of(dataclasses.asdict(model) | {"logits_scaling": 2.0}, dataclasses.asdict(model.routing))


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("data", {"format": "chat"}, "is tuned on conversations, and its loss counts the answers only; choose a run"),
        ("train", {"lora_rank": 4}, "its weights are a model and adapters, .*; choose a run"),
    ],
)
def test_a_tuned_run_is_refused(
    section: str, changes: dict[str, object], said: str, saved: Path, tmp_path: Path
) -> None:
    """Its loss, or its model, is another one than what is computed by hand."""
    folder = tmp_path / "tuned"
    shutil.copytree(saved, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings[section] |= changes
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(Problem, match=said) as caught:
        by_hand.open_run(folder)
    assert "\n" not in str(caught.value)
