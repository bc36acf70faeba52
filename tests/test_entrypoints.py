"""The programs, as people run them: each in its own process, on a model that trains in a second."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs
from tests.training.test_run import SUMMARY_KEYS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text. It holds the caches too."""
    folder = tmp_path_factory.mktemp("entrypoints")
    runs.write_text(folder / "stories.txt")
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    out = place / "run"
    finished = runs.complete(runs.flags(place / "stories.txt", out, steps=4, save_every=4), place)
    assert finished.returncode == 0, finished.stderr
    for words in ("parameters", "step 4/4", "validation loss", "bits/byte", "best checkpoint", "next: uv run"):
        assert words in finished.stdout
    return out


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def test_training_leaves_its_files(trained: Path) -> None:
    names = {"config.json", "tokenizer.json", "metrics.jsonl", "summary.json", "samples.txt", "checkpoints"}
    assert names <= {p.name for p in trained.iterdir()}
    newest = trained / "checkpoints" / "step_00000004"
    assert {"arrays", "manifest.json", "weights.safetensors"} == {p.name for p in newest.iterdir()}
    assert set(json.loads((trained / "summary.json").read_text())) >= SUMMARY_KEYS
    for line in (trained / "metrics.jsonl").read_text().splitlines():
        assert {"step", "split", "loss"} <= set(json.loads(line))


def test_a_run_goes_on(trained: Path, place: Path) -> None:
    """The run is extended; then no steps are left; then the folder is refused without --resume."""
    more = runs.complete(["--out", str(trained), "--resume", "--steps", "6"], place)
    assert more.returncode == 0, more.stderr
    assert "resumed at step 4: train.steps 4 -> 6" in more.stdout
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["steps"], summary["resumed_from"]) == (6, 4)
    again = runs.complete(["--out", str(trained), "--resume"], place)
    assert (again.returncode, again.stderr) == (0, "")
    assert "already trained to step 6; --steps extends it" in again.stdout
    refused = runs.complete(["--out", str(trained)], place)
    assert refused.returncode == 2
    assert "add --resume" in refused.stderr


def test_a_dense_run_becomes_a_mixture_of_experts(place: Path) -> None:
    """Two commands: the folder of the second is named after the preset of the first. The new run can be resumed."""
    dense = place / "dense"
    arguments = runs.flags(place / "stories.txt", dense, steps=4, save_every=4)
    assert runs.complete([*arguments, "--model.dense=active"], place).returncode == 0
    sparse = runs.complete(["--upcycle", str(dense), "--top-k", "2"], place)
    assert sparse.returncode == 0, sparse.stderr
    assert f"upcycled from step 4 of {dense}" in sparse.stdout
    summary = json.loads((place / "runs" / "nano-upcycled" / "summary.json").read_text())
    before = json.loads((dense / "summary.json").read_text())
    assert summary["inherited_flops"] == before["training_flops"] > 0
    assert summary["val_loss"] < before["val_loss"]
    again = runs.complete(["--out", "runs/nano-upcycled", "--resume", "--steps", "5"], place)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 4: train.steps 4 -> 5" in again.stdout


def test_stories_are_told_twice_the_same(trained: Path, place: Path) -> None:
    command = ["generate", "--run", str(trained), "--prompt", "the cat", "--max-tokens", "20", "--num-stories", "2"]
    first, second = (runs.complete([*command, "--seed", "3"], place, runs.COMMANDS) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.count("the cat") >= 2
    other = runs.complete([*command, "--seed", "4"], place, runs.COMMANDS)
    assert other.stdout != first.stdout


def test_evaluation_ends_with_json(trained: Path, place: Path) -> None:
    """The run's own validation text, which the summary scored too, and another text."""
    own = runs.complete(["evaluate", "--run", str(trained)], place, runs.COMMANDS)
    assert own.returncode == 0, own.stderr
    scored, summary = last_line(own.stdout), json.loads((trained / "summary.json").read_text())
    keys = "val_loss val_bits_per_byte val_drop_fraction tokens scored text_has_changed baselines_bits_per_byte"
    assert set(scored) == set(keys.split())
    assert set(scored["baselines_bits_per_byte"]) == {"unigram", "trigram", "kneser_ney_5gram", "entropy_floor"}
    assert scored["text_has_changed"] is False
    assert scored["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    (place / "other.txt").write_text("a dog sat on the mat.")
    other = runs.complete(["evaluate", "--run", str(trained), "--data", str(place / "other.txt")], place, runs.COMMANDS)
    assert last_line(other.stdout)["tokens"] == 22


def test_the_weights_are_safetensors(trained: Path) -> None:
    """weights.safetensors has the names and the values of the parameters."""
    import numpy as np
    from safetensors.numpy import load_file

    import moe_jax
    from moe_jax.runs.arrays import named_leaves

    run = moe_jax.load_run(trained)
    weights, params = load_file(run.checkpoint.path / "weights.safetensors"), named_leaves(run.params)
    assert set(weights) == set(params)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, np.asarray(params[name]))
