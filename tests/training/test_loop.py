"""When a run evaluates, saves, stops and ends. Nothing is trained: the session is a stand-in."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.config import TrainConfig
from moe_jax.system.signals import Signals
from moe_jax.training import run
from moe_jax.training.logging import SHOWN_LINES, shown_sample
from moe_jax.training.state import RunCounters


class Pause:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Stand:
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
        monkeypatch.setattr(run, "_evaluate_and_sample", self.evaluate)

    def evaluate(self, *_: Any) -> float:
        self.events.append("evaluated")
        if self.stop_within:
            self.signals.stop_signal = signal.SIGTERM
        return self.loss

    def after(self, step: int) -> bool:
        sync = lambda: self.events.append("synced")  # noqa: E731
        logger: Any = SimpleNamespace(paused=Pause, sync=sync, say=self.events.append)
        return run.evaluate_and_save_if_due(self.session, step, logger, self.signals)


@pytest.mark.parametrize(
    ("step", "evaluates", "saves"),
    [
        *((0, False, False), (1, False, False), (3, False, True), (4, True, False), (6, False, True)),
        *((8, True, False), (9, False, True), (10, True, True), (12, True, True)),
    ],
)
def test_what_is_due_after_a_step(step: int, evaluates: bool, saves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation without improvement is not saved by itself. The last step is evaluated and saved in any case."""
    stand = Stand(monkeypatch, loss=2.0)
    assert stand.after(step) == (step >= 10)
    assert ("evaluated" in stand.events) == evaluates
    assert (("saved", 2.0 if evaluates else None) in stand.events) == saves


def test_an_improvement_is_saved_at_once_with_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, loss=1.5)
    stand.after(4)
    assert stand.events == ["evaluated", "synced", ("saved", 1.5)]
    assert (stand.counters.best, stand.counters.evaluated) == (1.5, 4)


def test_a_step_that_was_evaluated_or_saved_is_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a resume from the checkpoint of this step."""
    stand = Stand(monkeypatch, loss=2.0)
    stand.counters.evaluated, stand.session.saved_step = 12, 12
    assert stand.after(12)
    assert stand.events == []


@pytest.mark.parametrize("steps", [12, 100])
@pytest.mark.parametrize("loss", [1.0, 2.0])
def test_an_evaluation_that_was_made_up_is_saved(loss: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of this step was saved without it. Otherwise a run that was stopped within its last evaluation
    would not count it, and would make it up at every resume."""
    stand = Stand(monkeypatch, loss=loss, steps=steps)
    stand.session.saved_step = 12
    stand.after(12)
    assert stand.events == ["evaluated", "synced", ("saved", loss)]
    assert stand.counters.evaluated == 12


@pytest.mark.parametrize(("patience", "bad", "ends"), [(0, 99, False), (3, 1, False), (3, 2, True)])
def test_patience(patience: int, bad: int, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bad` evaluations without improvement came before this one, which is none either."""
    stand = Stand(monkeypatch, loss=2.0, patience=patience)
    stand.counters.without_improvement = bad
    assert stand.after(4) == ends
    assert (("saved", 2.0) in stand.events) == ends
    assert ("stopped early at step 4: 3 evaluations without improvement" in stand.events) == ends


def test_a_signal_saves_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that is due is left to the resumed run."""
    stand = Stand(monkeypatch)
    stand.signals.stop_signal = signal.SIGINT
    assert stand.after(4)
    assert stand.events == ["synced", ("saved", None)]
    assert (stand.counters.evaluated, stand.counters.best) == (0, 2.0)


def test_before_the_first_step_a_signal_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch)
    stand.signals.stop_signal = signal.SIGINT
    assert stand.after(0)
    assert stand.events == []


def test_a_signal_within_an_evaluation_saves_its_loss_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch)
    stand.stop_within = True
    assert stand.after(4)
    assert stand.events == ["evaluated", "synced", ("saved", 1.0)]


def test_a_sample_of_verse_keeps_its_lines() -> None:
    verse = "\nROMEO:\n  But   soft!\n\nWhat light\n"
    assert shown_sample(verse) == "  ROMEO:\n  But soft!\n  What light...", "the end is within a sentence"
    assert shown_sample(f"{verse} breaks?") == "  ROMEO:\n  But soft!\n  What light\n  breaks?"
    assert shown_sample("one line, " * 100) == "  " + ("one line, " * 100)[:400].rstrip() + "..."
    assert shown_sample("a\n" * 50).count("\n") == SHOWN_LINES - 1
