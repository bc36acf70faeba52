"""What a checkpoint belongs to, told by its manifest alone: its run, its model, its tokenizer."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.identity import (
    check_same_model,
    check_same_run,
    checkpoint_run_id,
    load_run_tokenizer,
    new_run_id,
    read_run_id,
    saved_config,
)
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.system.folders import Folder
from tests.support import tiny

A, B = "a" * 16, "0123456789abcdef"
CONFIG = RunConfig(model=tiny.config())
LEAVES: dict[str, Any] = {
    "params.embedding": [[13, 8], "float32", "d"],
    "params.blocks.0.ffn.router": [[8, 4], "float32", "d"],
    "params.blocks.0.norm": [[8], "float32", "d"],
    "params.blocks.1.norm": [[8], "float32", "d"],
    "opt.blocks.7.norm": [[8], "float32", "d"],
}


def checkpoint(step: int = 1, leaves: dict[str, Any] | None = None, **context: Any) -> Checkpoint:
    context = {"config": CONFIG.to_dict()} | context
    document = {"context": context, "leaves": LEAVES if leaves is None else leaves}
    return Checkpoint(Path(f"run/step_{step}"), step, None, 0.0, document)


def run_of(folder: Path, run_id: Any) -> Folder:
    (folder / "config.json").write_text(json.dumps({"run_id": run_id}))
    return Folder(folder)


# The run


def test_ids_are_16_hexadecimal_digits_and_differ() -> None:
    ids = {new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[0-9a-f]{16}", run_id) for run_id in ids)


@pytest.mark.parametrize("odd", [None, 7, "", "a" * 15, "a" * 17, "g" * 16, "A" * 16, "a" * 16 + "\n", ["a" * 16]])
def test_anything_else_is_no_id(odd: Any, tmp_path: Path) -> None:
    assert read_run_id(run_of(tmp_path, B)) == B
    assert read_run_id(run_of(tmp_path, odd)) is None
    assert checkpoint_run_id(checkpoint(run_id=B)) == B
    assert checkpoint_run_id(checkpoint(run_id=odd)) is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", "7", "{}"])
def test_without_a_usable_configuration_there_is_no_id(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert read_run_id(Folder(tmp_path)) is None
    assert checkpoint_run_id(checkpoint()) is None


@pytest.mark.parametrize(
    ("written", "ids", "expected"),
    [
        (A, [], A),
        (A, [A, A], A),
        (A, [None, A], A),  # a run of an earlier version got its id at a resume
        (None, [], None),
        (None, [None, None], None),
        (None, [B, B], B),
    ],
)
def test_checkpoints_of_one_run(written: str | None, ids: list[str | None], expected: str | None, tmp_path: Path):
    found = [checkpoint(step, run_id=run_id) for step, run_id in enumerate(ids)]
    assert check_same_run(run_of(tmp_path, written), found) == expected


@pytest.mark.parametrize(
    ("written", "ids", "said"),
    [
        (A, [A, B], rf"step_1: was saved by another run \({B}\) than the run of this folder \({A}\)"),
        (A, [B], rf"step_0: was saved by another run \({B}\) than the run of this folder \({A}\)"),
        (None, [None, B], rf"step_1: was saved by another run \({B}\) than the run of this folder \(without an id\)"),
        (None, [B, None], rf"step_1: was saved by another run \(without an id\) than .* folder \({B}\)"),
        (None, [A, B], rf"step_1: was saved by another run \({B}\) than .* folder \({A}\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_named(
    written: str | None, ids: list[str | None], said: str, tmp_path: Path
) -> None:
    found = [checkpoint(step, run_id=run_id) for step, run_id in enumerate(ids)]
    with pytest.raises(UserError, match=said):
        check_same_run(run_of(tmp_path, written), found)


# The model


def test_the_saved_configuration() -> None:
    assert saved_config(checkpoint()) == CONFIG
    for odd in (None, 7, {}, CONFIG.to_dict() | {"schema_version": 99}):
        with pytest.raises(CheckpointCorrupted, match="does not say what it belongs to"):
            saved_config(checkpoint(config=odd))
    wrong = copy.deepcopy(CONFIG.to_dict())
    wrong["train"]["steps"] = -1  # a ConfigError
    with pytest.raises(CheckpointCorrupted, match="does not say what it belongs to"):
        saved_config(checkpoint(config=wrong))


def test_a_checkpoint_of_the_same_model_passes_whatever_its_training() -> None:
    trained = copy.deepcopy(CONFIG.to_dict())
    trained["train"]["steps"] = 7
    check_same_model(checkpoint(config=trained), CONFIG)


@pytest.mark.parametrize(
    ("section", "name", "there", "flag"),
    [("model", "activation", "gelu", "--model.activation"), ("routing", "capacity_factor", 2.0, "--capacity-factor")],
)
def test_another_model_or_routing_is_refused_by_its_flag(section: str, name: str, there: Any, flag: str) -> None:
    saved = copy.deepcopy(CONFIG.to_dict())
    here = saved[section][name]
    assert here != there
    saved[section][name] = there
    with pytest.raises(UserError, match=rf"^{flag} {here}: run/step_1 was saved with {there}; give it that value"):
        check_same_model(checkpoint(config=saved), CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"params.blocks.2.norm": [[8], "float32", "d"]},
        {"params.blocks.1.norm": None},
        {"params.embedding": None},
        {"params.embedding": [[12, 8], "float32", "d"]},
        {"params.embedding": [[13, 9], "float32", "d"]},
    ],
    ids=str,
)
def test_arrays_of_another_model_are_refused(changes: dict[str, Any]) -> None:
    """Before anything of their size is built."""
    leaves = {name: leaf for name, leaf in (LEAVES | changes).items() if leaf is not None}
    check_same_model(checkpoint(), CONFIG)
    with pytest.raises(CheckpointCorrupted, match="not those of the model that its manifest names"):
        check_same_model(checkpoint(leaves=leaves), CONFIG)


# The tokenizer


def test_the_tokenizer_must_be_the_one_that_the_checkpoint_names(tmp_path: Path) -> None:
    definition, model = {"kind": "byte"}, tiny.config(vocab_size=257)
    byte = Tokenizer(definition, [bytes([i]) for i in range(256)], list)
    byte.save(tmp_path / "tokenizer.json")
    for known in (None, checkpoint(), checkpoint(tokenizer=byte.digest)):
        assert load_run_tokenizer(tmp_path, known, model).digest == byte.digest
    with pytest.raises(UserError, match=rf"tokenizer\.json: is not the tokenizer .* doctor --run {tmp_path} --repair"):
        load_run_tokenizer(tmp_path, checkpoint(tokenizer="another"), model)
