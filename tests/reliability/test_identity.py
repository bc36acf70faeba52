"""A tokenizer, a text and a folder belong to one run, and none is taken for that of another run."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_jax
from moe_jax.config import RunConfig, UserError, load_config
from moe_jax.data import tokenizers
from moe_jax.data.token_store import stored_documents
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inspection.report import write_report
from moe_jax.interop.source import open_source
from moe_jax.runs.load import open_run
from moe_jax.training import initial_weights
from moe_jax.training.session import Session
from tests.support.saved_run import resuming

pytestmark = pytest.mark.reliability


@pytest.fixture
def trained(
    whole: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, RunConfig]:
    """A copy of the run that nobody interrupted, and its configuration."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(cache))
    shutil.copytree(whole[0], tmp_path / "trained")
    config = load_config(tmp_path / "trained")
    assert config is not None
    return tmp_path / "trained", dataclasses.replace(config, out=str(tmp_path / "trained"))


def edit(run: Path, **changes: Any) -> None:
    document = json.loads((run / "config.json").read_text())
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (document[section] if section else document)[field] = value
    (run / "config.json").write_text(json.dumps(document))


# The tokenizer


def resume(run: Path) -> Session:
    saved = load_config(run)
    return Session.open(dataclasses.replace(saved, out=str(run)), resuming(saved))


OPENINGS: dict[str, Callable[[Path], Any]] = {
    "generate, evaluate, certify, chat, serve, quantize": lambda run: open_run(run),
    "export": lambda run: open_source(run),
    "sft": lambda run: initial_weights.of_run("--run", str(run)),
    "inspect": lambda run: write_report(run, run / "page.html", text="Once"),
    "load_run": lambda run: moe_jax.load_run(run),
    "--resume": lambda run: resume(run),
}


def another_tokenizer(run: Path) -> None:
    definition = {"kind": "bpe", "merges": [[ord("a"), ord(letter)] for letter in "bcd"]}
    Tokenizer.from_dict(definition | {"digest": tokenizers.json_digest(definition)}).save(run / "tokenizer.json")


@pytest.mark.parametrize("opening", OPENINGS)
def test_another_tokenizer_is_blamed_by_name(opening: str, run: Path) -> None:
    another_tokenizer(run)
    with pytest.raises(UserError, match=r"tokenizer\.json: is not the tokenizer that the run was") as caught:
        OPENINGS[opening](run)
    assert "\n" not in str(caught.value)
    assert "--data" not in str(caught.value)


# The validation text


def test_another_validation_text_is_said(saved: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """By `evaluate`, by `load_run(...).evaluate()`, and in the report."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    assert open_run(run).validation_text(progress=False).warning == ""
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"Another story, number {i}." for i in range(60)))
    edit(run, data__source=str(text))
    opened = open_run(run)
    found = opened.validation_text(progress=False)
    assert "has changed since the run was trained" in found.warning
    assert len(list(stored_documents(found.store.valid.tokens, opened.tokenizer))) > 0
    with pytest.warns(UserWarning, match="has changed since the run was trained"):
        moe_jax.load_run(run).evaluate()
    write_report(run, tmp_path / "page.html", text="Once")
    assert "has changed since the run was trained" in capsys.readouterr().err
    assert "has changed since the run was trained" in (tmp_path / "page.html").read_text()


# The settings


def test_an_edit_of_the_settings_by_hand_is_recorded(trained: tuple[Path, RunConfig]) -> None:
    """The history of resumes says what changed since the checkpoint, by a flag or by hand."""
    run, _ = trained
    edit(run, train__lr=0.001, train__steps=16, execution__remat=True)
    edited = load_config(run)
    assert edited is not None
    config = dataclasses.replace(edited, out=str(run), train=dataclasses.replace(edited.train, patience=3))
    session = Session.open(config, resuming(edited))
    (entry,) = json.loads((run / "config.json").read_text())["history"]
    assert entry["changed"] == {
        "train.steps": [12, 16],
        "train.lr": [0.005, 0.001],
        "train.patience": [0, 3],
        "execution.remat": [False, True],
    }
    assert "train.lr 0.005 -> 0.001" in session.notes[0]
