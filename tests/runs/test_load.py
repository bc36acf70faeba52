"""A run is opened, or it is said why not. What a checkpoint belongs to is told by its manifest alone."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.data.token_store import prepare_token_store
from moe_jax.inspection.decisions import decisions
from moe_jax.interop.source import open_source
from moe_jax.model import precision
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.catalog import SHIPPED
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore
from moe_jax.runs.load import open_run, saved_config, with_fewer_experts
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.training.programs import Programs
from tests.support import saved_run, tiny
from tests.support.saved_run import NAME, flip_a_bit, largest_file

CONFIG = RunConfig(model=tiny.config())


def test_the_parameters_are_the_saved_ones(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(str(copied))
    assert run.checkpoint.step == saved_run.STEP
    assert run.tokenizer.vocab_size == run.config.model.vocab_size == 257
    assert (run.config.execution.compute_dtype, str(np.dtype(run.policy.compute))) == ("float32", "float32")
    params = tiny.build(run.config.model)[1]
    tiny.assert_same_bits(run.params, params)
    assert capsys.readouterr() == ("", "")
    store, context = CheckpointStore(copied), run.checkpoint.context
    for step, val_loss in ((50, 0.5), (60, 2.0)):  # the one in the middle is the best
        store.save({"params": params, "step": np.int32(step)}, step, val_loss=val_loss, elapsed=1.0, context=context)
    assert (open_run(copied).checkpoint.step, open_run(copied, 60).checkpoint.step) == (50, 60)
    with pytest.raises(UserError, match=r"--step 41: .* it has 50, 60$"):
        open_run(copied, 41)


def test_a_folder_without_a_run_and_a_damaged_run(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^--run {tmp_path}: no run with a complete checkpoint there.*; or make a run"
    ):
        open_run(tmp_path)
    flip_a_bit(largest_file(copied / "checkpoints" / NAME))
    with pytest.raises(UserError, match=rf"^--run {copied}: every checkpoint is damaged; .* doctor --run {copied}"):
        open_run(copied)
    with pytest.raises(CheckpointCorrupted, match="was changed"):
        open_run(copied, saved_run.STEP)


def test_texts_are_written_in_float32_on_a_processor_with_units_for_bfloat16(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_bfloat16_units", lambda: "AMX")
    tokens = jax.numpy.asarray(tiny.tokens(1, 8))

    def hidden(graphdef: Any, params: Any) -> jax.Array:
        return merge(graphdef, params)(tokens, Mode.EVALUATE)[0]

    for chosen, scored, written in (("auto", "bfloat16", "float32"), ("bfloat16", "bfloat16", "bfloat16")):
        saved_run.edit_config(copied, "execution", compute_dtype=chosen)
        run = open_run(copied)
        for graphdef, name in ((run.graphdef, scored), (run.writer, written)):
            assert jax.eval_shape(partial(hidden, graphdef), run.params).dtype.name == name
        samples = jax.eval_shape(Programs.of(run.config).decoder().prefill, run.params, tokens, np.int32(3))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(samples.cache)} == {written}


def test_the_validation_text_is_the_runs_or_the_change_is_said(copied: Path, tmp_path: Path) -> None:
    run = open_run(copied)
    store = prepare_token_store(run.config.data, progress=False)
    found, warning = run.validation_text(progress=False)
    np.testing.assert_array_equal(found.valid.tokens, store.valid.tokens)
    assert warning == ""
    other = tmp_path / "other.txt"
    other.write_text("<|endoftext|>".join(f"Another story, number {i}." for i in range(60)))
    saved_run.edit_config(copied, "data", source=str(other))
    _, warning = open_run(copied).validation_text(progress=False)
    assert warning.startswith(f"--data {other}: has changed since the run was trained; ")


EDITS: dict[str, tuple[Any, str]] = {
    "vocabulary": (lambda w: w.update({EMBEDDING: w[EMBEDDING][1:]}), r"embedding is \[256, 8\] float32"),
    "missing": (lambda w: w.pop("params.norm.scale"), "params.norm.scale is not there"),
    "more": (lambda w: w.update({"params.norm.bias": np.zeros(8, np.float32)}), "params.norm.bias is no array of"),
    "rank": (
        lambda w: w.update({"params.norm.scale": w["params.norm.scale"][None]}),
        r"norm.scale is \[1, 8\] float32",
    ),
    "column": (lambda w: w.update({ROUTER: w[ROUTER][:, 1:]}), r"ffn.router is \[8, 3\] float32"),
    "dtype": (lambda w: w.update({ROUTER: w[ROUTER].astype(np.float16)}), r"ffn.router is \[8, 4\] float16"),
    "nan": (lambda w: w[ROUTER].__setitem__((7, 3), np.nan), "ffn.router has NaN or infinite values"),
    "infinite": (lambda w: w[ROUTER].__setitem__((0, 0), -np.inf), "ffn.router has NaN or infinite values"),
}
EMBEDDING, ROUTER = "params.embedding", "params.blocks.1.ffn.router"


@pytest.mark.parametrize("opened", [open_run, open_source])
@pytest.mark.parametrize("edit", EDITS)
def test_edited_weights_with_right_digests_are_refused(edit: str, opened: Any, copied: Path) -> None:
    """Each command reads its weights by one of these two. Saved again, so that all digests are those of the edit."""
    run = open_run(copied)
    weights = {name: np.array(leaf) for name, leaf in named_leaves({"params": run.params}).items()}
    change, said = EDITS[edit]
    change(weights)
    store = CheckpointStore(copied)
    store.save(weights | {"step": np.int32(50)}, 50, val_loss=0.5, elapsed=1.0, context=run.checkpoint.context)
    with pytest.raises(UserError, match=rf"^{store.at(50).path}: [a-z0-9.]*{said}") as failure:
        opened(copied)
    assert "\n" not in str(failure.value)


# Without a run on disk


def checkpoint(**context: Any) -> Checkpoint:
    return Checkpoint(Path("run/step_1"), {"context": {"config": CONFIG.to_dict()} | context})


def test_the_saved_configuration() -> None:
    assert saved_config(checkpoint()) == CONFIG
    wrong = copy.deepcopy(CONFIG.to_dict())
    wrong["train"]["steps"] = -1  # a ConfigError
    for odd in (None, 7, {}, CONFIG.to_dict() | {"schema_version": 99}, wrong):
        with pytest.raises(CheckpointCorrupted, match="its manifest holds no configuration"):
            saved_config(checkpoint(config=odd))


def test_fewer_experts_than_trained() -> None:
    """In the first layer the choices are the best of the trained ones, and the gates are renormalised over them."""
    run = open_run(SHIPPED / "nano")
    tokens = np.arange(40, dtype=np.int32)
    all_chosen = next(decisions(run, tokens))
    top_k = run.config.model.routing.top_k
    for fewer in range(1, top_k + 1):
        made = next(decisions(with_fewer_experts(run, fewer), tokens))
        assert made.expert.shape == (run.config.model.layers, len(tokens), fewer)
        np.testing.assert_array_equal(made.expert[0], all_chosen.expert[0, :, :fewer])
        kept = all_chosen.gate[0, :, :fewer]
        if fewer > 1:
            np.testing.assert_allclose(made.gate[0], kept / kept.sum(-1, keepdims=True), rtol=1e-5)
    for wrong in (0, -1, top_k + 1):
        with pytest.raises(ConfigError, match=f"--active {wrong}: must be from 1 to {top_k}"):
            with_fewer_experts(run, wrong)


def test_of_config_json_only_the_path_of_the_text_counts(copied: Path) -> None:
    """A text that has moved is named at a resume, and the best checkpoint may be an earlier one."""
    document = json.loads((copied / "config.json").read_text())
    document["data"]["source"] = "moved.txt"
    document["train"]["steps"] = 7
    (copied / "config.json").write_text(json.dumps(document))
    config = open_run(copied).config
    assert config.data.source == "moved.txt"
    assert config.train == saved_config(CheckpointStore(copied).at(saved_run.STEP)).train
