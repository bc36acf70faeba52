"""When a run evaluates, saves, stops and ends. Nothing is trained: the session is a stand-in."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.cli.train import Process, Train, trained
from moe_jax.config import DataConfig, RunConfig, TrainConfig, load_config
from moe_jax.system.signals import Signals, Stopped
from moe_jax.training import loop
from moe_jax.training.start import Start
from moe_jax.training.state import RunCounters
from tests.support import saved_run, tiny


class Pause:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Run:
    """A run of 10 steps that evaluates at every 4th and saves at every 3rd. `events` says what it did, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: float = 1.0, **train: Any) -> None:
        self.events: list[Any] = []
        self.counters = RunCounters(best=2.0)
        self.signals = Signals()
        config = TrainConfig(**({"steps": 10, "eval_every": 4, "save_every": 3} | train))
        self.session: Any = SimpleNamespace(
            config=SimpleNamespace(train=config),
            counters=self.counters,
            saved_step=0,
            folder=SimpleNamespace(path=Path("runs/x")),
            save=lambda step, val_loss: self.events.append(("saved", val_loss)),
        )
        self.loss, self.stop_within = loss, False
        monkeypatch.setattr(loop, "_evaluate_and_sample", self.evaluate)

    def evaluate(self, *_: Any) -> float:
        self.events.append("evaluated")
        if self.stop_within:
            self.signals.stop_signal = signal.SIGTERM
            raise Stopped(signal.SIGTERM)
        return self.loss

    def after(self, step: int) -> bool:
        log: Any = SimpleNamespace(sync=lambda: self.events.append("synced"))
        shown: Any = SimpleNamespace(say=self.events.append, close=lambda: self.events.append("bar closed"))
        flush = lambda: self.events.append("flushed")  # noqa: E731
        logger: Any = SimpleNamespace(flush=flush, paused=Pause, log=log, terminal=shown)
        return loop.evaluate_and_save_if_due(self.session, step, logger, self.signals)


@pytest.mark.parametrize(
    ("step", "evaluates", "saves"),
    [
        *((0, False, False), (1, False, False), (3, False, True), (4, True, False), (6, False, True)),
        *((8, True, False), (9, False, True), (10, True, True), (12, True, True)),
    ],
)
def test_what_is_due_after_a_step(step: int, evaluates: bool, saves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation without improvement is not saved by itself. The last step is evaluated and saved in any case."""
    run = Run(monkeypatch, loss=2.0)
    assert run.after(step) == (step >= 10)
    assert ("evaluated" in run.events) == evaluates
    assert (("saved", 2.0 if evaluates else None) in run.events) == saves


def test_an_improvement_is_saved_at_once_with_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, loss=1.5)
    run.after(4)
    assert run.events == ["flushed", "evaluated", "flushed", "synced", ("saved", 1.5)]
    assert (run.counters.best, run.counters.evaluated, run.signals.unsaved) == (1.5, 4, False)


def test_a_step_that_was_evaluated_or_saved_is_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a resume from the checkpoint of this step."""
    run = Run(monkeypatch, loss=2.0)
    run.counters.evaluated, run.session.saved_step = 12, 12
    assert run.after(12)
    assert run.events == []


@pytest.mark.parametrize("steps", [12, 100])
@pytest.mark.parametrize("loss", [1.0, 2.0])
def test_an_evaluation_that_was_made_up_is_saved(loss: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of this step was saved without it. Otherwise a run that was stopped within its last evaluation
    would not count it, and would make it up at every resume."""
    run = Run(monkeypatch, loss=loss, steps=steps)
    run.session.saved_step = 12
    run.after(12)
    assert run.events == ["flushed", "evaluated", "flushed", "synced", ("saved", loss)]
    assert run.counters.evaluated == 12


@pytest.mark.parametrize(("patience", "bad", "ends"), [(0, 99, False), (3, 1, False), (3, 2, True)])
def test_patience(patience: int, bad: int, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bad` evaluations without improvement came before this one, which is none either."""
    run = Run(monkeypatch, loss=2.0, patience=patience)
    run.counters.without_improvement = bad
    assert run.after(4) == ends
    assert (("saved", 2.0) in run.events) == ends
    assert ("stopped early at step 4: 3 evaluations without improvement" in run.events) == ends


@pytest.mark.parametrize(
    ("steps", "seconds", "left"),
    [
        (1000, 1000, None),  # 40 s and 980 steps of 0.5 s, which are 577 s with evaluations
        (1000, 617, None),
        (1000, 616, None),  # another start would end no earlier
        (1000, 560, 824),  # 0.85 of (560 - 40 - 35) s
        (1000, 60, loop.PACE_STEPS),
        (loop.PACE_STEPS, 30, None),  # it is over
        (110, 60, None),  # 45 s are left, as long as another start of the fewest steps would take
        (111, 60, loop.PACE_STEPS),
    ],
)
def test_a_run_that_is_too_slow_for_its_time_gets_fewer_steps(steps: int, seconds: float, left: int | None) -> None:
    """Ten steps took 5 s, after 35 s until then: compiling, and ten steps."""
    if left is None:
        loop.check_pace(steps, 35.0, 40.0, seconds)
    else:
        with pytest.raises(loop.TooSlow, match=r"a step takes 0\.50 s") as slow:
            loop.check_pace(steps, 35.0, 40.0, seconds)
        assert slow.value.steps == left


def test_a_signal_saves_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.signals.stop_signal = signal.SIGINT
    with pytest.raises(Stopped) as stopped:
        run.after(1)
    assert stopped.value.status == 128 + signal.SIGINT
    last = "stopped at step 1, which is saved; go on with --resume"
    assert run.events[-3:] == [("saved", None), "bar closed", last]  # or the bar of an older step stands below it
    assert run.signals.how_to_go_on == "go on from the newest checkpoint with --resume"


def test_before_the_first_save_nothing_is_said_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.signals.stop_signal = signal.SIGINT
    with pytest.raises(Stopped):
        run.after(0)
    assert run.events[-1] == (
        "stopped before the first step; no step was saved, so the same command starts the run again"
    )
    again = Train.parse(["--out", "runs/my x"]).resume_command
    assert again == "`uv run moe-jax train --out 'runs/my x' --resume`"
    assert Signals(saved=True, resume=again).how_to_go_on == f"go on from the newest checkpoint with {again}"


def test_a_signal_within_an_evaluation_saves_without_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resumed run makes the evaluation up."""
    run = Run(monkeypatch)
    run.stop_within = True
    with pytest.raises(Stopped):
        run.after(4)
    assert ("saved", None) in run.events
    assert (run.counters.evaluated, run.counters.best) == (0, 2.0)


def test_a_sample_of_verse_keeps_its_lines() -> None:
    verse = "\nROMEO:\n  But   soft!\n\nWhat light\n"
    assert loop._shown(verse) == "  ROMEO:\n  But soft!\n  What light"
    assert loop._shown("one line, " * 100) == "  " + ("one line, " * 100)[:400].rstrip()
    assert loop._shown("a\n" * 50).count("\n") == loop.SHOWN_LINES - 1


def test_a_run_without_time_starts_again_with_the_fewest_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the first start is left: neither its steps in config.json, nor its lines in metrics.jsonl."""
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(f"a cat sat on mat {i}" for i in range(90)))
    config = RunConfig(
        out=str(tmp_path / "run"),
        model=tiny.config(layers=1, vocab_size=257),
        data=DataConfig(source=str(tmp_path / "text.txt"), tokenizer="byte", eval_tokens=64),
        train=TrainConfig(steps=10**6, batch_size=2, log_every=1, eval_every=10**6, save_every=10**6),
    )
    with saved_run.quick_training(tmp_path / "cache", samples=False):
        session = trained(config, Start(config), Process(Signals(), []), seconds=1e-3)
    assert "with 20 steps instead of 1,000,000" in capsys.readouterr().out
    saved = load_config(tmp_path / "run")
    assert saved is not None
    assert saved.train.steps == session.config.train.steps == 20
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if record["split"] == "train"] == list(range(1, 21))
