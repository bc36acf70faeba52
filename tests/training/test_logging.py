"""Records in metrics.jsonl and in other loggers; metrics.jsonl read from its end; the average loss on the terminal.

The load of the experts in TensorBoard is a histogram whose bars are the experts.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.config import RunConfig, UserError
from moe_jax.runs.records import last_train_record
from moe_jax.system.files import Folder
from moe_jax.training import logging
from moe_jax.training.logging import MetricsLog, Terminal, add_load


class Writer:
    def __init__(self) -> None:
        self.written: dict = {}

    def add_histogram_raw(self, **values: object) -> None:
        self.written = values


def test_each_expert_is_a_bar() -> None:
    """Shares 1/2, 1/4, 1/4: bars end at 1, 2 and 3, and the mean lies at 0.5/2 + 1.5/4 + 2.5/4 = 1.25."""
    writer = Writer()
    add_load(writer, "load/layer_0", [0.5, 0.25, 0.25], 7)
    assert writer.written["bucket_limits"] == [1.0, 2.0, 3.0]
    assert writer.written["bucket_counts"] == [0.5, 0.25, 0.25]
    assert writer.written["sum"] == pytest.approx(1.25)
    assert (writer.written["tag"], writer.written["global_step"]) == ("load/layer_0", 7)


def log_of(folder: Path, track: Any = "none") -> MetricsLog:
    return MetricsLog(Folder(folder), RunConfig(track=track))


RECORD = {"step": 7, "split": "train", "loss": 1.5, "skipped": False, "starved": [], "load": [[0.5, 0.5], [1.0, 0.0]]}


def test_a_record_is_one_line_at_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("earlier\n")
    log = log_of(tmp_path)
    log.write(RECORD | {"loss": math.nan})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert (lines[0], json.loads(lines[1])) == ("earlier", RECORD | {"loss": None})
    log.sync()
    log.close()


def test_numbers_go_to_the_other_loggers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers but the step, under the name of their split."""
    told: list[Any] = []
    writer = SimpleNamespace(
        add_scalar=lambda *given: told.append(given),
        add_histogram_raw=lambda **given: told.append((given["tag"], given["global_step"])),
        close=lambda: told.append("tensorboard closed"),
    )
    run = SimpleNamespace(
        log=lambda *given, step: told.append((*given, step)), finish=lambda: told.append("wandb ended")
    )
    monkeypatch.setattr(logging, "_tensorboard", lambda _: writer)
    monkeypatch.setattr(logging, "_wandb", lambda *_: run)
    for track in ("tensorboard", "wandb"):
        log = log_of(tmp_path, track)
        log.write(RECORD)
        log.close()
    assert told == [
        ("train/loss", 1.5, 7),
        ("train/skipped", False, 7),
        ("load/layer_0", 7),
        ("load/layer_1", 7),
        "tensorboard closed",
        ({"train/loss": 1.5, "train/skipped": False}, 7),
        "wandb ended",
    ]


def test_a_resumed_run_continues_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id is the folder's: it is the same in another process, and another in another folder."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: asked.append(given)))
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        log_of(tmp_path / name, "wandb")._file.close()
    ids = [given["id"] for given in asked]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].startswith("a-")
    assert (asked[0]["project"], asked[0]["resume"], asked[0]["dir"]) == ("moe-jax", "allow", str(tmp_path / "a"))
    assert (tmp_path / "a" / "wandb").is_dir()


def test_a_real_writer_takes_it(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        add_load(writer, "load/layer_0", [0.5, 0.25, 0.25], 7)
    assert any(path.stat().st_size > 0 for path in tmp_path.iterdir())


@pytest.mark.parametrize("after", [0, 1, 7, 8, 9, 500])
def test_the_newest_record_of_training_wherever_it_stands(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `after` records of validation behind it, read in pieces that cut records anywhere."""
    records = [{"step": step, "split": "train"} for step in range(3)]
    records += [{"step": step, "split": "val"} for step in range(after)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for piece in (1, 30, 31, 32, 33, 300, 2**15):
        monkeypatch.setattr("moe_jax.runs.records._TAIL_BYTES", piece)
        assert last_train_record(Folder(tmp_path)) == {"step": 2, "split": "train"}


def test_no_record_of_training(tmp_path: Path) -> None:
    assert last_train_record(Folder(tmp_path / "absent")) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "val"}\n' * 3)
    assert last_train_record(Folder(tmp_path)) == {}
    (tmp_path / "metrics.jsonl").write_text("")
    assert last_train_record(Folder(tmp_path)) == {}


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ([2.0, math.nan, 2.0], ["2.000", "2.000", "2.000"]),
        ([math.nan, 2.0, 3.0], ["nan", "2.000", "2.200"]),
    ],
)
def test_a_loss_that_is_not_a_number_does_not_stay(
    losses: list[float], shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(3, 0)
    for step, loss in enumerate(losses, start=1):
        terminal.step({"step": step, "loss": loss, "tokens_per_second": 1.0, "drop_fraction": 0.0}, 1.0, 0.0)
    terminal.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line.split("loss ")[1].split(" ")[0] for line in lines] == shown


def test_trackio_is_started_like_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a page of its own (`embed`), by the name of the folder, so that a resumed run continues its curves."""
    asked: list[dict[str, Any]] = []
    told: list[Any] = []
    run = SimpleNamespace(log=lambda *given, step: told.append((*given, step)), finish=lambda: told.append("ended"))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **given: asked.append(given) or run))
    log = log_of(tmp_path, "trackio")
    log.write(RECORD)
    log.close()
    assert told == [({"train/loss": 1.5, "train/skipped": False}, 7), "ended"]
    [given] = asked
    assert (given["project"], given["resume"], given["embed"]) == ("moe-jax", "allow", False)
    assert given["name"].startswith(f"{tmp_path.name}-")
    assert (given["config"]["train.steps"], given["config"]["track"]) == (RunConfig().train.steps, "trackio")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_cannot_be_started_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> Any:
        raise RuntimeError("no key\nand more")

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    with pytest.raises(
        UserError, match=rf"^--track {name}: cannot be started \(no key\); fix that, or leave the flag out$"
    ):
        log_of(tmp_path, name)
