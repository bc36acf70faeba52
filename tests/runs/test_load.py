"""A run is opened, or it is said why not."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.data.token_store import prepare_token_store
from moe_jax.model import precision
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.load import open_run
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.training.programs import Programs
from tests.runs.test_checkpoint import flip_a_bit, largest_file
from tests.support import saved_run, tiny

NAME = f"step_{saved_run.STEP:08d}"


def edit_config(run: Path, section: str, **changes: object) -> None:
    document = json.loads((run / "config.json").read_text())
    document[section] |= changes
    (run / "config.json").write_text(json.dumps(document))


def edit_manifest(run: Path, **context: object) -> None:
    """With a right digest."""
    path = run / "checkpoints" / NAME / manifest.NAME
    document = json.loads(path.read_text())
    document["context"] |= context
    path.write_text(manifest.render(document))


def test_the_parameters_are_those_that_were_saved(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(str(copied))
    assert run.checkpoint.step == saved_run.STEP
    assert run.tokenizer.vocab_size == run.config.model.vocab_size == 257
    assert (run.config.execution.compute_dtype, str(np.dtype(run.policy.compute))) == ("float32", "float32")
    tiny.assert_same_bits(run.params, tiny.build(run.config.model)[1])
    assert capsys.readouterr() == ("", "")
    assert open_run(copied, saved_run.STEP).checkpoint == run.checkpoint
    with pytest.raises(UserError, match=rf"--step 41: .* it has {saved_run.STEP}$"):
        open_run(copied, 41)


def test_a_step_is_opened_and_else_the_best(copied: Path) -> None:
    """Three checkpoints, of which the one in the middle is the best."""
    store = CheckpointStore(copied)
    first = store.at(saved_run.STEP)
    context = first.manifest["context"]
    params = tiny.build(open_run(copied).config.model)[1]
    for step, val_loss in ((50, 0.5), (60, 2.0)):
        store.save({"params": params}, step, val_loss=val_loss, elapsed=1.0, context=context)
    assert open_run(copied).checkpoint.step == 50
    assert open_run(copied, 60).checkpoint.step == 60


def test_a_folder_without_a_run_and_a_damaged_run(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--run {tmp_path}: no run with a complete checkpoint there.*; make one"):
        open_run(tmp_path)
    flip_a_bit(largest_file(copied / "checkpoints" / NAME))
    with pytest.raises(UserError, match=rf"^--run {copied}: every checkpoint is damaged; .* doctor --run {copied}"):
        open_run(copied)
    with pytest.raises(CheckpointCorrupted, match="was changed"):
        open_run(copied, saved_run.STEP)


def test_a_checkpoint_of_another_run_is_refused(copied: Path) -> None:
    edit_manifest(copied, run_id="0" * 16)
    with pytest.raises(UserError, match="was saved by another run"):
        open_run(copied)


def test_another_model_or_tokenizer_is_refused(copied: Path) -> None:
    edit_config(copied, "model", activation="gelu")
    with pytest.raises(UserError, match=r"^--model\.activation gelu: .* was saved with swiglu"):
        open_run(copied)
    edit_config(copied, "model", activation="swiglu")
    edit_manifest(copied, tokenizer="another")
    with pytest.raises(UserError, match="is not the tokenizer"):
        open_run(copied)


def test_a_manifest_without_a_configuration_is_damage_with_its_path(copied: Path) -> None:
    edit_manifest(copied, config=None)
    said = rf"^{copied}/checkpoints/{NAME}: its manifest does not say .*doctor --run {copied}. checks the others$"
    with pytest.raises(CheckpointCorrupted, match=said):
        open_run(copied)


def test_another_precision_than_in_training_is_said(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(copied, "execution", compute_dtype="bfloat16")
    assert str(np.dtype(open_run(copied).policy.compute)) == "bfloat16"
    said = capsys.readouterr().err
    assert f"execution.compute_dtype is bfloat16, and the checkpoint of step {saved_run.STEP} was" in said
    assert "trained with float32" in said


def test_texts_are_written_in_float32_on_a_processor_with_units_for_bfloat16(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "AMX")
    tokens = jax.numpy.asarray(tiny.tokens(1, 8))
    for asked, scored, written in (("auto", "bfloat16", "float32"), ("bfloat16", "bfloat16", "bfloat16")):
        edit_config(copied, "execution", compute_dtype=asked)
        run = open_run(copied)
        hidden = [merge(graphdef, run.params)(tokens, Mode.EVALUATE)[0] for graphdef in (run.graphdef, run.writer)]
        assert [part.dtype.name for part in hidden] == [scored, written]
        samples = Programs.of(run.config).decoder().prefill(run.params, tokens, np.int32(3))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(samples.cache)} == {written}


def test_the_validation_text_is_the_runs_or_the_change_is_said(copied: Path, tmp_path: Path) -> None:
    run = open_run(copied)
    store = prepare_token_store(run.config.data, progress=False)
    found = run.validation_text(progress=False)
    np.testing.assert_array_equal(found.store.valid.tokens, store.valid.tokens)
    assert found.warning == ""
    other = tmp_path / "other.txt"
    other.write_text("<|endoftext|>".join(f"Another story, number {i}." for i in range(60)))
    edit_config(copied, "data", source=str(other))
    opened = open_run(copied)
    found = opened.validation_text(progress=False)
    assert found.warning.startswith(f"--data {other}: has changed since the run was trained; ")
    assert opened.tokenizer.decode(found.store.valid.tokens).count("Another story") == 3
    edit_manifest(copied, data=None)  # of a version that did not say
    assert open_run(copied).validation_text(progress=False).warning == ""


@pytest.mark.parametrize(("progress", "lines"), [(True, 2), (False, 0)])
def test_progress_is_shown_unless_it_is_not_wanted(
    progress: bool, lines: int, copied: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "new"))
    run = open_run(copied)
    run.validation_text(progress)
    assert len(capsys.readouterr().err.splitlines()) == lines
