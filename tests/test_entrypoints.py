"""The programs, as people run them: training in a process of its own, on a model that trains in a second."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.cli.main import main, run_as, run_command
from moe_jax.runs.load import open_run, with_fewer_experts
from moe_jax.training.evaluate import evaluate_run
from tests.reliability import runs
from tests.support import saved_run

pytestmark = pytest.mark.runs

TRAIN = """
import runpy
from moe_jax.inspection import report
report.report_run = lambda files: ["no report"]
runpy.run_path("train.py", run_name="__main__")
"""
"""train.py without the report at its end, which tests/inspection/test_report.py writes."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a text. It holds the caches too."""
    folder = tmp_path_factory.mktemp("entrypoints")
    runs.write_text(folder / "stories.txt")
    with saved_run.quick_training(folder) as patch:
        patch.setattr("moe_jax.inspection.report.report_run", lambda files: ["no report"])
        yield folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    out = place / "run"
    command = [sys.executable, "-c", TRAIN, *runs.flags(place / "stories.txt", out, steps=4, save_every=4)]
    finished = subprocess.run(command, env=runs.environment(place), cwd=runs.ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for words in ("parameters", "step 4/4", "validation loss", "bits/byte", "best checkpoint", "next: uv run"):
        assert words in finished.stdout
    return out


def test_training_leaves_its_files(trained: Path) -> None:
    names = {"config.json", "tokenizer.json", "metrics.jsonl", "summary.json", "samples.txt", "checkpoints"}
    assert names <= {p.name for p in trained.iterdir()}
    newest = trained / "checkpoints" / "step_00000004"
    assert {"arrays", "manifest.json", "weights.safetensors"} <= {p.name for p in newest.iterdir()}


def train(out: Path, *argv: str) -> None:
    assert main(lambda given: run_as("train", given, "train.py"), ["--out", str(out), "--resume", *argv]) == 0


def test_a_story_is_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--run", str(trained), "--prompt", "the cat", "--max-tokens", "20", "--num-stories", "2"]
    assert main(run_command, [*command, "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("the cat") >= 2


def test_evaluation_ends_with_json(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own validation text, which the summary scored too, and another text."""

    def evaluate(*argv: str) -> dict:
        assert main(run_command, ["evaluate", "--run", str(trained), "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    scored, summary = evaluate(), json.loads((trained / "summary.json").read_text())
    keys = "val_loss val_bits_per_byte val_drop_fraction tokens scored text_has_changed baselines_bits_per_byte"
    assert set(scored) == set(keys.split())
    assert set(scored["baselines_bits_per_byte"]) == {"trigram", "entropy_floor"}
    assert scored["text_has_changed"] is False
    assert scored["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    (place / "other.txt").write_text("a dog sat on the mat.")
    assert evaluate("--data", str(place / "other.txt"))["tokens"] == 22
    fewer = evaluate("--active", "1")
    run = with_fewer_experts(open_run(trained), 1)
    expected = evaluate_run(run, run.validation_text()[0].valid.stream).loss
    assert fewer["val_loss"] == scored["val_loss"]
    assert (fewer["active"], fewer["val_loss_active"]) == (1, pytest.approx(expected, rel=1e-6))
    assert abs(expected - scored["val_loss"]) > 1e-4
