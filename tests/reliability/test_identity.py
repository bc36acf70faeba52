"""A tokenizer belongs to one run, and that of another run is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_jax
from moe_jax.config import UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inspection.report import write_report
from moe_jax.interop.source import open_source
from moe_jax.runs.catalog import load_config
from moe_jax.runs.load import open_run
from moe_jax.training import initial_weights
from moe_jax.training.session import Session
from tests.support.saved_run import resuming

pytestmark = pytest.mark.reliability


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
    Tokenizer(definition).save(run / "tokenizer.json")


@pytest.mark.parametrize("opening", OPENINGS)
def test_another_tokenizer_is_blamed_by_name(opening: str, run: Path) -> None:
    another_tokenizer(run)
    with pytest.raises(UserError, match=r"tokenizer\.json: is not the tokenizer that the run was") as caught:
        OPENINGS[opening](run)
    assert "\n" not in str(caught.value)
    assert "--data" not in str(caught.value)
