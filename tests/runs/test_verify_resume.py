"""`benchmarks/verify_resume.py` without its runs: their flags, what is compared, how they are started and killed.

`tests/reliability` has it train.
"""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import verify_resume

from moe_jax.cli.train import Train
from moe_jax.config import RunConfig, UserError
from moe_jax.runs.checkpoint import CheckpointStore
from tests.support import tiny

CONFIG = RunConfig(model=dataclasses.replace(tiny.config(), vocab_size=0, seq_len=16, bias=True))


def parsed(config: RunConfig) -> RunConfig:
    """The configuration that the flags of a short run give."""
    return Train.parse([*verify_resume.short_flags(config), "--out", "runs/x"]).settings[0]


def test_a_short_run_has_every_setting_but_its_length() -> None:
    changes = {"resume": True, "upcycle": "runs/dense", "track": "wandb", "out": "elsewhere"}
    asked = dataclasses.replace(CONFIG, **changes, train=dataclasses.replace(CONFIG.train, patience=3, lr=0.125))
    found = parsed(asked)
    train = dataclasses.replace(asked.train, steps=12, log_every=1, eval_every=6, save_every=4, patience=0)
    data = dataclasses.replace(asked.data, eval_tokens=2048, stories=verify_resume.STORIES)
    assert found == dataclasses.replace(CONFIG, out="runs/x", train=train, data=data)
    assert asked.data.eval_tokens > 2048
    assert asked.data.stories > verify_resume.STORIES


# What is compared


def pretend(run: Path, saved: Path, resumed_from: int | None = None, story: str = "text") -> None:
    """A finished run: a copy of the saved one."""
    shutil.copytree(saved, run, dirs_exist_ok=True)
    (run / "samples.txt").write_text(story)
    (run / "summary.json").write_text(json.dumps({"resumed_from": resumed_from}))


def test_times_are_not_compared_and_all_else_is(saved: Path, tmp_path: Path) -> None:
    pretend(tmp_path / "a", saved)
    first = verify_resume.fingerprint(tmp_path / "a")
    newest = CheckpointStore(saved).newest()
    assert newest is not None
    assert list(first) == [f"step {newest.step}", "metrics", "samples"]
    assert first[f"step {newest.step}"] == newest.manifest["state"]
    metrics = tmp_path / "a" / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text.replace('"tokens_per_second": 100.0', '"tokens_per_second": 7, "wall_seconds": 3'))
    assert verify_resume.fingerprint(tmp_path / "a") == first
    metrics.write_text(text.replace('"loss": 1.2', '"loss": 1.3'))
    assert verify_resume.fingerprint(tmp_path / "a") == first | {
        "metrics": verify_resume.fingerprint(tmp_path / "a")["metrics"]
    }
    assert verify_resume.fingerprint(tmp_path / "a") != first
    metrics.write_text(text)
    (tmp_path / "a" / "samples.txt").write_text("other")
    other = verify_resume.fingerprint(tmp_path / "a")
    assert {name for name in first if first[name] != other[name]} == {"samples"}


@pytest.mark.parametrize(("story", "status"), [("text", 0), ("another", 1)])
def test_the_comparison_is_printed_and_is_the_status(
    story: str, status: int, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    drawn: list[tuple[int, int]] = []

    def finish(flags: list[str], run: Path) -> None:
        calls.append((run.name, flags[-1] == "--resume"))
        assert flags[flags.index("--out") + 1] == str(run)
        pretend(run, saved, *((8, story) if flags[-1] == "--resume" else (None, "text")))

    def kill_after(flags: list[str], metrics: Path, step: int) -> None:
        calls.append((metrics.parent.name, metrics.name, step))

    monkeypatch.setattr(verify_resume, "_finish", finish)
    monkeypatch.setattr(verify_resume, "_kill_after", kill_after)
    monkeypatch.setattr(random, "randrange", lambda *given: drawn.append(given) or 7)
    assert verify_resume.verify_resume(CONFIG) == status
    assert calls == [("whole", False), ("killed", "metrics.jsonl", 7), ("killed", True)]
    assert drawn == [(5, 12)], "after the first checkpoint, and before the end"
    printed = capsys.readouterr().out
    assert "12 steps without a stop" in printed
    assert "killed after step 7 or soon after" in printed
    assert "resumed from step 8\n" in printed
    assert [line.split()[-2] for line in printed.splitlines() if line.startswith(("step ", "metrics", "samples"))] == [
        "=",
        "=",
        "=" if status == 0 else "≠",
    ]
    assert printed.splitlines()[-1].startswith("FAIL: they differ; " if status else "PASS: every bit is equal")


# Processes


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces Python by a shell script."""

    def replace(script: str) -> None:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(verify_resume.sys, "executable", str(path))

    return replace


def test_a_run_that_fails_or_ends_before_its_kill_is_said(program: Any, tmp_path: Path) -> None:
    program(f"echo {'x' * 400}; echo the end >&2; exit 3")
    with pytest.raises(UserError, match=r"^killed: the run ended with status 3: x{292}\sthe end$") as caught:
        verify_resume._finish([], tmp_path / "killed")
    assert len(str(caught.value).partition("3: ")[2]) == 300
    program("exit 0")
    with pytest.raises(UserError, match=r"^killed: the run ended with status 0 before it was killed; run it again$"):
        verify_resume._kill_after([], tmp_path / "killed" / "metrics.jsonl", 5)
