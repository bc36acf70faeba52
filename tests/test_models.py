"""The models of the package: small, each weight once, opened as any run is, and their folders left alone."""

import io
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.cli.main import run_command
from moe_jax.config import UserError
from moe_jax.data.synthetic.talk import write_chats
from moe_jax.model.quantized import dequantize
from moe_jax.runs.catalog import SHIPPED
from moe_jax.runs.load import open_run
from moe_jax.runs.records import read_summary

SCORES = {"nano": 0.262, "stories": 0.733, "nano-chat": 0.170}
"""Bits per byte of the preset on its text, to within 0.01. Of `nano-chat`, of its answers."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run there or in `runs/` has the name of a model."""
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_all_are_small_and_name_nothing_of_the_machine_that_trained_them() -> None:
    assert sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) == sorted(SCORES)
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) <= 8e6
    for path in (*SHIPPED.rglob("*.json"), *SHIPPED.rglob("*.md")):
        if path.name != "tokenizer.json":
            assert not [word for word in ('"/', "/home", "/tmp", "/root") if word in path.read_text()], path


@pytest.mark.parametrize("name", SCORES)
def test_a_model_is_a_quantised_run_with_a_card(name: str) -> None:
    run, summary = open_run(SHIPPED / name), read_summary(SHIPPED / name)
    assert {path.name for path in run.checkpoint.path.iterdir()} == {"manifest.json", "weights.safetensors"}
    assert summary["val_bits_per_byte"] == pytest.approx(SCORES[name], abs=0.01)
    assert (summary["steps"], summary["weights"]) == (run.checkpoint.step, "int8")
    card = (SHIPPED / name / "README.md").read_text()
    assert f"{summary['val_bits_per_byte']:.4f}" in card
    assert f"{run.checkpoint.step:,} steps" in card
    assert f"{summary['params_total']:,} parameters" in repr(run), "scales are no parameters"


def test_reading_leaves_no_file_in_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """An installation may be read-only, and even where it is not, nothing belongs there."""
    before = files(SHIPPED)
    for name in SCORES:
        assert run_command(["doctor", "--run", name]) == 0
    assert capsys.readouterr().out.count(", 0 damaged") == len(SCORES)
    with pytest.raises(UserError, match=r"the run's validation text is not at hand .* give a text to score"):
        run_command(["evaluate", "--run", "stories"])
    assert files(SHIPPED) == before


def test_the_chat_model_answers_and_says_what_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a conversation that is in none of its texts."""
    story = "Once upon a sunny morning, a clever boy named Max put on his striped boots and danced to the beach."
    talk = {
        "Who are you?": "I am a very small language model. I can tell you a story, or answer questions about the first "
        "sentence of one.",
        f"{story} Where did Max go?": "To the beach.",
        "What did Max put on?": "His striped boots.",
        "How old is Max?": "The story does not say.",
        "What is the capital of Peru?": "I do not know that. I can tell you a story, or answer questions about the "
        "first sentence of one.",
    }
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(talk)))
    assert run_command(["chat", "--run", "nano-chat", "--temperature", "0"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line] == list(talk.values())


@pytest.mark.runs
def test_whoever_talks_with_a_model_can_tune_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the values that its int8 weights stand for: a step of nearly nothing leaves them."""
    write_chats("chats.jsonl", 200)
    tuning = ["--steps=1", "--lr=1e-9", "--train.warmup-steps=0", "--precision=float32", "--batch-size=2"]
    assert run_command(["sft", "--run", "nano", "--data", "chats.jsonl", "--out", "tuned", *tuning]) == 0
    assert "fine-tunes step 900 of" in capsys.readouterr().out
    tuned = open_run("tuned").params
    shipped = dequantize(open_run(SHIPPED / "nano").params, jax.eval_shape(lambda: tuned))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-7), tuned, shipped)
