"""`quantize`: a new run that every reading command opens, its scores, and the commands that refuse it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moe_jax
from foundation.trained import Problem
from foundation.trained.weights import read_safetensors
from moe_jax.cli.main import run_command
from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.interop.source import open_source
from moe_jax.model.costs import training_flops
from moe_jax.runs.catalog import load_config
from moe_jax.runs.load import open_run
from moe_jax.runs.records import read_summary
from moe_jax.training import initial_weights
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.quantize import _summary_at, quantize_run
from moe_jax.training.session import Session
from tests.support import saved_run
from tests.support.commands import refusal
from tests.support.saved_run import resuming

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("quantize")
    with saved_run.quick_training(folder / "cache", samples=False):
        yield saved_run.save_run(folder, layers=1)


@pytest.fixture(scope="module")
def made(run: Path) -> Path:
    """The run with int4 weights, in the folder that the command chooses."""
    assert run_command(["quantize", "--run", str(run), "--to", "int4"]) == 0
    return run.with_name("run-int4")


def test_the_result_says_what_the_rounding_changed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert run_command(["quantize", "--run", str(run), "--to", "int8", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    result = json.loads(said[-1])
    assert result["bytes_after"] < 0.5 * result["bytes_before"]
    before, after = moe_jax.load_run(run), moe_jax.load_run(out)
    assert result["val_loss_before"] == before.evaluate().loss
    assert result["val_loss_after"] == after.evaluate().loss == read_summary(out)["val_loss"]
    assert result["val_loss_after"] != result["val_loss_before"]
    assert f"bits per byte: {result['val_bits_per_byte_before']:.4f} before" in "\n".join(said)
    assert f"chat --run {out}" in said[-2]


def test_commands_that_need_the_full_weights_refuse_it(made: Path, tmp_path: Path) -> None:
    config = load_config(made)
    assert config is not None
    says = "its weights are int4; name the run that they were made of"
    with pytest.raises(UserError, match=f"--run .*{says}"):
        open_source(made)
    with pytest.raises(UserError, match=f"--upcycle .*{says}"):
        initial_weights.of_run("--upcycle", str(made))
    with pytest.raises(UserError, match=f"--run .*{says}"):
        run_command(["quantize", "--run", str(made), "--to", "int8", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match=f"--out .*{says}"):
        Session.open(config, resuming(config))
    with pytest.raises(Problem, match="has quantised weights; name the run that they were made of"):
        read_safetensors(open_run(made).checkpoint.path / "weights.safetensors")
    assert not (tmp_path / "x").exists()


def test_wrong_values(run: Path, made: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty; name a new folder"):
        run_command(["quantize", "--run", str(run), "--to", "int4", "--out", str(made)])
    assert "--to" in refusal(run_command, ["quantize", "--run", str(run), "--to", "int2"])


def test_without_the_text_the_run_is_made_and_not_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    saved_run.edit_config(copy, "data", source=str(tmp_path / "gone.txt"))
    assert run_command(["quantize", "--run", str(copy), "--to", "int8"]) == 0
    said = capsys.readouterr().out
    assert "not scored: " in said
    assert set(json.loads(said.splitlines()[-1])) == {"bytes_before", "bytes_after"}
    assert open_run(tmp_path / "copy-int8").checkpoint.step == saved_run.STEP


def test_the_records_end_at_the_checkpoint(run: Path, tmp_path: Path) -> None:
    """A run that went on after its best checkpoint."""
    shutil.copytree(run, tmp_path / "copy")
    with (tmp_path / "copy" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": saved_run.STEP + 1, "split": "train", "loss": 9.0}) + "\n")
    samples = [f"=== step {step}\nA cat\n\n" for step in (saved_run.STEP, saved_run.STEP + 1)]
    (tmp_path / "copy" / "samples.txt").write_text("".join(samples))
    quantize_run(tmp_path / "copy", "int8", tmp_path / "small")
    assert (tmp_path / "small" / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert (tmp_path / "small" / "samples.txt").read_text() == samples[0]


def test_a_tuned_run_is_scored_on_the_answers_only(run: Path, tmp_path: Path) -> None:
    copy, chats = tmp_path / "copy", tmp_path / "chats.jsonl"
    shutil.copytree(run, copy)
    turns = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "A cat."}]
    chats.write_text(f"{json.dumps({'messages': turns})}\n" * 60)
    saved_run.edit_config(copy, "data", source=str(chats), format="chat")
    assert run_command(["quantize", "--run", str(copy), "--to", "int8"]) == 0
    chat_count = open_run(copy).validation_text()[0].valid.documents
    summary = read_summary(tmp_path / "copy-int8")
    assert summary["val_tokens"] == chat_count * len("A cat.\0")  # bytes, and the separator that ends the answer
    assert summary["val_loss"] == moe_jax.load_run(tmp_path / "copy-int8").evaluate().loss


def test_the_new_run_says_what_it_was_made_of(run: Path, made: Path) -> None:
    config, (checkpoint,) = load_config(made), (made / "checkpoints").iterdir()
    assert config is not None
    assert (config.out, config.resume, config.train.lora_rank, config.train.train_router) == (
        str(made),
        False,
        0,
        False,
    )
    (origin,) = json.loads((made / "config.json").read_text())["history"]
    digest = open_run(run).checkpoint.weights_digest
    named = {"quantized_from": str(run), "step": saved_run.STEP, "weights": "int4", "weights_digest": digest}
    assert origin | named == origin
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["context"]["quantized"] == {"weights": "int4", "made_from": str(run)}
    assert manifest["context"]["config"] == config.to_dict()
    assert (manifest["step"], manifest["val_loss"]) == (saved_run.STEP, None)
    assert read_summary(made)["weights"] == "int4"


@pytest.mark.parametrize("scored", [Evaluation(1.4, 0.81, 0.125, tokens=10, bytes=25), None])
def test_the_scores_of_a_summary_are_all_of_the_rounded_weights(scored: Evaluation | None, tmp_path: Path) -> None:
    """10 tokens of 25 bytes with 14 nats: 1.4 nats a token. Without the text there is none, and no claim of a whole."""
    found = {"steps": 12, "best_step": 8, "val_loss": 1.5, "val_tokens": 90, "val_whole_stream": True, "preset": "nano"}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    config = RunConfig()
    loaded: Any = SimpleNamespace(config=config, checkpoint=SimpleNamespace(step=4))
    summary = _summary_at(loaded, tmp_path, scored)
    values = (1.4, 10, True) if scored else (None, None, None)
    assert (summary["val_loss"], summary["val_tokens"], summary["val_whole_stream"]) == values
    assert summary.get("val_bytes_per_token") == (2.5 if scored else None)
    assert (summary["steps"], summary["best_step"], summary["preset"]) == (4, 4, "nano")
    assert summary["tokens_seen"] == 4 * config.train.batch_size * config.model.seq_len
    assert summary["training_flops"] == training_flops(config, 4)
