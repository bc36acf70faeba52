"""What a run writes and shows: records in metrics.jsonl, lines, warnings, and the terminal.

Nothing is trained: the session of the step logger is a stand-in.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.config import RunConfig, TrainConfig, UserError
from moe_jax.training import logging
from moe_jax.training.logging import StepLogger
from moe_jax.training.state import STARVED_STEPS, RunCounters
from tests.support import tiny

# The reports of steps


LOAD = [[0.25] * 4] * 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(logging, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class Seen:
    """A logger of a run that begins at step 0, with what it wrote, showed and said."""

    def __init__(self, folder: Path, model: dict[str, Any] | None = None, first: int = 0, **train: Any) -> None:
        self.said: list[str] = []
        self.path = folder / "metrics.jsonl"
        self.counters = RunCounters()
        of_100_tokens = {"batch_size": 1, "grad_accum": 1}
        train = {"steps": 10, "log_every": 3} | of_100_tokens | train
        config = RunConfig(model=tiny.config(**({"seq_len": 100} | (model or {}))), train=TrainConfig(**train))
        self.session: Any = SimpleNamespace(
            config=config,
            folder=SimpleNamespace(path=folder),
            state=SimpleNamespace(step=first),
            counters=self.counters,
            begin=-2.5,
            elapsed=7.5,
            data=SimpleNamespace(store=SimpleNamespace(train=SimpleNamespace(target_bytes=300, targets=100))),
        )
        self.logger = StepLogger(self.session)
        self.logger.say = lambda text: self.said.append(text)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def add(self, step: int, finite: bool = True, load: Any = LOAD, drops: float = 0.5) -> None:
        metrics = SimpleNamespace(
            answers=None, loss=2.0, balance_loss=1.5, z_loss=0.25, drop_fraction=drops, load=np.array(load, np.float32)
        )
        report: Any = SimpleNamespace(finite=finite, metrics=metrics, grad_norm=3.0, lr=0.125)
        self.logger.add(step, report)


def test_a_record_of_a_step(clock: list[float], tmp_path: Path) -> None:
    """3 steps of 100 tokens in 2 s. 300 bytes follow the first of 101 tokens."""
    seen = Seen(tmp_path)
    for step in (1, 2, 3):
        seen.add(step)
    assert seen.records == [], "one step late"
    clock[0] = 2.0
    seen.logger.flush()
    assert seen.records == [
        {
            "step": 3,
            "split": "train",
            "loss": 2.0,
            "balance_loss": 1.5,
            "z_loss": 0.25,
            "drop_fraction": 0.5,
            "grad_norm": 3.0,
            "skipped": False,
            "starved": [],
            "lr": 0.125,
            "tokens_seen": 300,
            "tokens_per_second": 150.0,
            "wall_seconds": 7.5,
            "load": LOAD,
        }
    ]
    (line,) = seen.said[1:]
    assert line == "step  3/10 | 7 s left | 0.962 bits/byte | 150 tokens/s | 50.0% dropped"
    seen.logger.flush()
    assert len(seen.records) == 1


def test_records_are_on_the_disk_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, written = Seen(tmp_path), []
    monkeypatch.setattr(logging.os, "fsync", lambda file: written.append(os.fstat(file).st_size))
    seen.logger.write({"step": 1})
    seen.logger.sync()
    assert written == [seen.path.stat().st_size] == [len('{"step": 1}\n')]


def test_which_steps_are_written(clock: list[float], tmp_path: Path) -> None:
    """Every third, the last, and those at which something happened."""
    seen = Seen(tmp_path)
    for step in range(1, 11):
        seen.add(step, finite=step != 4)
    seen.logger.flush()
    assert [record["step"] for record in seen.records] == [3, 4, 6, 9, 10]
    assert (seen.counters.drop_steps, seen.counters.drop_sum) == (9, 4.5), "all finite steps"
    assert seen.said[0] == "first step done 2.5 s after the start, data and compilation included"


@pytest.mark.parametrize(("balancing", "flag"), [("loss", "--train.aux-loss-coef"), ("bias", "--train.router-bias-lr")])
def test_a_starved_expert_is_said_when_it_has_starved_long_enough(
    balancing: Any, flag: str, clock: list[float], tmp_path: Path
) -> None:
    """With the flag that acts."""
    seen = Seen(tmp_path, model={"balancing": balancing}, steps=1000, log_every=1000)
    for step in range(1, STARVED_STEPS + 2):
        seen.add(step, load=[[0.5, 0.5, 0, 0.0], [0.25] * 4])
    seen.logger.flush()
    assert [line.partition(" got")[0] for line in seen.said[1:3]] == [
        f"step {STARVED_STEPS} | expert {expert} of layer 0" for expert in (2, 3)
    ]
    assert all(f"a larger {flag} brings it back" in line for line in seen.said[1:3])
    assert [record["step"] for record in seen.records] == [STARVED_STEPS]
    assert seen.records[0]["starved"] == [[0, 2], [0, 3]]


def test_steps_that_stay_bad_end_the_run(clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "MAX_SKIPPED_IN_A_ROW", 3)
    seen = Seen(tmp_path)
    for step, finite in ((1, False), (2, False), (3, True), (4, False), (5, False), (6, False)):
        seen.add(step, finite=finite)
    assert seen.counters.skipped_in_a_row == 2
    with pytest.raises(UserError, match=r"^step 6: 3 steps in a row .*; lower --lr, and go on with --resume$"):
        seen.logger.flush()
    assert all(record["skipped"] for record in seen.records if record["step"] != 3)


def test_a_pause_does_not_count(clock: list[float], tmp_path: Path) -> None:
    seen = Seen(tmp_path, log_every=1)
    clock[0] = 1.0
    with seen.logger.paused():
        clock[0] = 5.0
    clock[0] = 6.0
    seen.add(1)
    seen.logger.flush()
    assert seen.records[0]["tokens_per_second"] == 100 / 2
    clock[0] = 10.0
    seen.add(2)
    seen.logger.flush()
    assert seen.records[1]["tokens_per_second"] == 100 / 4


# The terminal
