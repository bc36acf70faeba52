"""Whole runs of a tiny model on a text file: what they leave, and that a resumed one is one that never stopped."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suites.random_tokens import RandomTokenTrainer

from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig, UserError
from moe_jax.runs.catalog import load_config
from moe_jax.system import environment
from moe_jax.training.header import print_run_header
from moe_jax.training.programs import Programs
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from tests.support import saved_run, tiny
from tests.support.saved_run import resuming

SAMPLES = True
"""Runs write samples (`conftest.py`)."""
TIMES = {"tokens_per_second", "wall_seconds"}
SUMMARY_KEYS = set(
    """preset steps tokens_seen train_loss val_loss val_bits_per_byte val_bytes_per_token entropy_floor_bits_per_byte
    trigram_bits_per_byte params_total params_active training_flops train_drop_fraction val_drop_fraction balance_loss
    tokens_per_second wall_seconds device precision resumed_from""".split()  # noqa: SIM905, as a list it fills a page
)


class Stop(Exception):
    """A process that dies between two steps."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "ran", "sat", "on", "a", "mat", "and", "then", "it", "was", "happy"]
    stories = [" ".join(rng.choice(words, 12)) + "." for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories))
    return path


def configuration(text: Path, out: Path, **changes: Any) -> RunConfig:
    """A run of 12 steps that drops and has dropout. `changes` are fields of `TrainConfig` or `ExecutionConfig`."""
    model = ModelConfig(
        seq_len=16,
        layers=1,
        width=16,
        heads=2,
        experts=4,
        expert_hidden=8,
        dropout=0.1,
        routing=RoutingConfig(top_k=2, capacity_factor=0.75),
    )
    execution = {f.name: changes.pop(f.name) for f in dataclasses.fields(ExecutionConfig) if f.name in changes}
    values = {"steps": 12, "batch_size": 4, "grad_accum": 2, "log_every": 3, "eval_every": 4, "save_every": 6}
    return RunConfig(
        out=str(out),
        model=model,
        data=DataConfig(source=str(text), tokenizer="byte"),
        train=TrainConfig(**(values | changes)),
        execution=ExecutionConfig(**({"compute_dtype": "float32"} | execution)),
    )


def run(config: RunConfig, die_at: int | None = None) -> Session:
    """Train, from the newest checkpoint where the folder holds a run. May die just before the step after `die_at`."""
    session = Session.open(config, resuming(load_config(Path(config.out))))
    step = session.programs.step

    def mortal(state, batch):
        if int(state.step) == die_at:
            raise Stop
        return step(state, batch)

    if die_at is None:
        take_steps(session)
        return session
    saved_run.replace_step(session, mortal)
    with pytest.raises(Stop):
        take_steps(session)
    return session


def compilations(session: Session) -> dict[str, int]:
    programs = {
        "step": session.programs.step,
        "evaluation": session.programs.evaluation,
        "prefill": session.decoder.prefill,
        "decoding": session.decoder.write,
    }
    return {name: program._cache_size() for name, program in programs.items()}  # pyright: ignore


ONCE = {"step": 1, "evaluation": 1, "prefill": 1, "decoding": 1}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records(folder)]


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, dict[str, Any]]:
    session = run(configuration(text, tmp_path_factory.mktemp("runs") / "whole"))
    return session, finish(session)


def test_what_a_run_leaves(uninterrupted: tuple[Session, dict[str, Any]]) -> None:
    session, result = uninterrupted
    assert compilations(session) == ONCE, "with three evaluations, samples and the whole validation stream"
    folder = session.folder.path
    document = json.loads((folder / "config.json").read_text())
    assert RunConfig.from_dict(document) == session.config
    assert document["model"]["vocab_size"] == 257
    assert {"jax", "flax", "optax"} <= set(document["versions"])
    assert [(r["step"], r["split"]) for r in records(folder)] == [
        (3, "train"),
        (4, "val"),
        (6, "train"),
        (8, "val"),
        (9, "train"),
        (12, "train"),
        (12, "val"),
    ]
    assert (folder / "samples.txt").read_text().count("=== step ") == 3
    assert json.loads((folder / "summary.json").read_text()) == result
    assert set(result) >= SUMMARY_KEYS
    assert (result["steps"], result["tokens_seen"]) == (12, 12 * 8 * 16)
    assert (result["resumed_from"], result["entropy_floor_bits_per_byte"], result["val_drop_fraction"]) == (
        None,
        None,
        0,
    )
    assert 0.1 < result["train_drop_fraction"] < 1
    # The byte tokenizer: a byte a token, but for separators.
    assert 0.9 < result["val_bytes_per_token"] < 1
    losses = [r["loss"] for r in records(folder) if r["split"] == "val"]
    assert losses == sorted(losses, reverse=True)


def test_resumed_is_uninterrupted(uninterrupted: tuple[Session, dict[str, Any]], text: Path, tmp_path: Path) -> None:
    """Dead before step 8 of 12, with checkpoints of 4 (evaluated) and 6: steps 7 and 8 are taken again."""
    whole, whole_result = uninterrupted
    out = tmp_path / "resumed"
    config = configuration(text, out)
    first = run(config, die_at=7)
    assert [c.step for c in first.checkpoints.list()] == [4, 6]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "split": "train", "lo')  # a line that was cut short
    session = run(config)
    assert session.resumed_from == 6
    tiny.assert_same_bits(session.state, whole.state)
    assert timeless(out) == timeless(whole.folder.path)
    assert (out / "samples.txt").read_text() == (whole.folder.path / "samples.txt").read_text()
    result = finish(session)
    assert compilations(session) == ONCE, "also with a state that came from a disk"
    same = set(result) - TIMES - {"resumed_from"}
    assert {k: result[k] for k in same} == {k: whole_result[k] for k in same}
    assert result["resumed_from"] == 6
    assert session.elapsed > first.checkpoints.at(12).elapsed > session.elapsed_before > 0


def without_sources(hlo: str) -> str:
    """HLO text without the paths and lines of source files."""
    hlo = re.sub(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n?", "", hlo, flags=re.MULTILINE)
    return re.sub(r", metadata=\{[^}]*\}", "", hlo)


def test_a_session_runs_the_program_that_is_counted_and_timed(uninterrupted: tuple[Session, dict[str, Any]]) -> None:
    """What certificates, plans and benchmarks compile without running is the very program of a run."""
    session = uninterrupted[0]
    trainer = RandomTokenTrainer.of(session.config, batch_size=4, micro_batches=2)
    own = session.programs.step.lower(session.state, session.data.batch(0)).compile()  # pyright: ignore
    timed = trainer.step.lower(trainer.state, trainer.batch).compile()  # pyright: ignore
    counted = Programs.of(session.config).compiled_step(4, 2)
    own, timed, counted = (without_sources(program.as_text()) for program in (own, timed, counted))
    assert "fusion" in own
    assert own == counted == timed


def test_other_text_is_refused(uninterrupted: tuple[Session, dict[str, Any]], text: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted[0].folder.path, tmp_path / "other")
    config = dataclasses.replace(uninterrupted[0].config, out=str(tmp_path / "other"))
    before = timeless(tmp_path / "other")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("cat", "cow"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(other)))
    with pytest.raises(UserError, match=r"--data .*not the text"):
        Session.open(config, resuming(load_config(tmp_path / "other")))
    assert timeless(tmp_path / "other") == before


def test_a_resume_before_the_first_checkpoint_starts_again(text: Path, tmp_path: Path) -> None:
    config = configuration(text, tmp_path / "early")
    run(config, die_at=3)
    run(dataclasses.replace(config, resume=True, train=dataclasses.replace(config.train, lr=0.5)), die_at=0)
    document = json.loads((tmp_path / "early" / "config.json").read_text())
    assert (document["history"], document["train"]["lr"]) == ([], 0.5)


def test_a_signal_while_the_last_step_is_saved_counts(text: Path, tmp_path: Path) -> None:
    """The run ends as stopped, with the step saved."""
    session = Session.open(configuration(text, tmp_path / "run"))
    write, saves = session.save, []

    def interrupted(step: int, val_loss: float | None) -> None:
        write(step, val_loss)
        saves.append(step)
        if step == session.config.train.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    session.save = interrupted
    assert take_steps(session) == signal.SIGTERM
    assert saves == [4, 6, 8, 12]
    assert session.saved_step == int(session.state.step) == 12


def test_the_number_of_steps_follows_the_pace(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --minutes: after 20 steps it is set once and recorded, and the learning rate falls to 0 at the new end. A
    clock that goes a second a step: 40 of 60 s are left, of which 0.85 are for steps."""
    config = configuration(text, tmp_path / "run", minutes=1.0, warmup_steps=4, steps=500, log_every=1, eval_every=1000)
    session = Session.open(config)
    started = json.loads((tmp_path / "run" / "config.json").read_text()) | {"history": [{"initialised_from": "other"}]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(started))
    monkeypatch.setattr(Session, "elapsed", property(lambda session: float(session.state.step)))
    assert take_steps(session) is None
    started["train"]["steps"] = session.config.train.steps
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == started
    assert session.config.train.steps == 20 + int(0.85 * 40)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rates = {record["step"]: record["lr"] for record in records if record["split"] == "train"}
    assert list(rates) == list(range(1, 55))
    peak = config.train.lr
    assert [rates[n] for n in (1, 2, 5)] == pytest.approx([peak / 5, peak * 2 / 5, peak])
    assert rates[21] == pytest.approx(peak * (1 + math.cos(math.pi * 16 / 49)) / 2)
    assert rates[54] == pytest.approx(0, abs=1e-9)


def test_samples_have_only_the_tokens_of_the_tokenizer(text: Path, tmp_path: Path) -> None:
    """The model's vocabulary may be larger."""
    config = configuration(text, tmp_path / "run")
    session = Session.open(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300)))
    assert (session.config.model.vocab_size, session.decoder.vocab_size) == (300, 257)


def test_the_header_fits_a_small_terminal_and_says_that_the_card_is_not_used(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(environment, "has_nvidia_card", lambda: True)
    monkeypatch.setattr(environment, "has_cuda_plugin", lambda: False)
    print_run_header(Session.open(configuration(text, tmp_path / "run")))
    said = "this computes on the CPU, although this machine seems to have an NVIDIA card: JAX's CUDA plugin is not"
    printed = capsys.readouterr().out
    assert said in " ".join(printed.split())
    assert len(printed.splitlines()) <= 24  # the progress bar needs rows, too
    names = [line[:12].strip() for line in printed[printed.index("\nrun ") :].splitlines() if line[:1].strip()]
    assert names == ["run", "plan", "data", "tokenizer", "model", "parameters", "precision", "to compare"]
