"""A tokenizer, a text and a folder belong to one run, and none is taken for that of another run."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_jax
from moe_jax.config import UserError
from moe_jax.data import tokenizers
from moe_jax.data.token_store import stored_documents
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inspection.report import write_report
from moe_jax.interop.source import open_source
from moe_jax.runs.catalog import load_config
from moe_jax.runs.load import open_run
from moe_jax.training import initial_weights
from moe_jax.training.session import Session
from tests.support import saved_run
from tests.support.saved_run import resuming

pytestmark = pytest.mark.reliability


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
    assert open_run(run).validation_text(progress=False)[1] == ""
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"Another story, number {i}." for i in range(60)))
    config = open_run(run).config
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(text)))
    saved_run.edit_manifest(run, config=other.to_dict())
    opened = open_run(run)
    found, warning = opened.validation_text(progress=False)
    assert "has changed since the run was trained" in warning
    assert len(list(stored_documents(found.valid.tokens, opened.tokenizer))) > 0
    with pytest.warns(UserWarning, match="has changed since the run was trained"):
        moe_jax.load_run(run).evaluate()
    write_report(run, tmp_path / "page.html", text="Once")
    assert "has changed since the run was trained" in capsys.readouterr().err
    assert "has changed since the run was trained" in (tmp_path / "page.html").read_text()
