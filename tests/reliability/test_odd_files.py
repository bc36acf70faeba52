"""Odd and hostile files in a run's folder: each is left out, or refused in one line before anything large is made."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest

from moe_jax.config import ConfigError, UserError, load_config
from moe_jax.inspection.report import training_curves, write_report
from moe_jax.plots.figures import _Metrics
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.doctor import examine
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.load import open_run
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.runs.records import last_train_record, read_metrics, read_summary
from moe_jax.system.files import Folder
from moe_jax.training.session import check_same_data_and_model
from moe_jax.training.state import RunCounters
from tests.reliability.test_hostile import reseal
from tests.support import saved_run

pytestmark = pytest.mark.reliability


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 500


# metrics.jsonl, samples.txt, traces, summary.json


ODD_LINES = {
    "a byte that is no UTF-8": b'{"step": 5, "split": "tr\xffain"}',
    "deeply nested": b"[" * 200_000,
    "a deeply nested value": b'{"step": 5, "split": "train", "loss": ' + b"[" * 200_000,
    "no step": b'{"split": "train"}',
    "a step that is a text": b'{"step": "5", "split": "train"}',
    "a step of 400 digits": b'{"step": 1' + b"0" * 400 + b', "split": "train"}',
    "another split": b'{"step": 5, "split": ["train"]}',
    "a loss that is a text": b'{"step": 5, "split": "train", "loss": "low"}',
    "a loss of 400 digits": b'{"step": 5, "split": "train", "loss": 1' + b"0" * 400 + b"}",
    "a ragged load": b'{"step": 5, "split": "train", "load": [[1, 2], [3]]}',
    "a load of 400 digits": b'{"step": 5, "split": "train", "load": [[1' + b"0" * 400 + b"]]}",
}


def test_odd_lines_of_metrics_stop_nothing(run: Path) -> None:
    """Each line alone is left out, and all together are."""
    path, every = run / "metrics.jsonl", list(ODD_LINES.values())
    lines = path.read_bytes().splitlines()
    whole = [json.loads(line) for line in lines]
    for odd in [*([line] for line in every), every]:
        path.write_bytes(b"\n".join([*lines[:2], *odd, *lines[2:], *odd]) + b"\n")
        assert read_metrics(run) == {s: [r for r in whole if r["split"] == s] for s in ("train", "val")}
    RunFolder(run).truncate_logs_after(30, 30)
    assert path.read_bytes().splitlines() == [line for line in lines if json.loads(line)["step"] <= 30]
    for odd in every:
        path.write_bytes(b"\n".join([*lines, odd]))
        assert last_train_record(Folder(run))["step"] == saved_run.STEP


@pytest.mark.parametrize("value", ["NaN", "1e999"])
def test_numbers_that_are_not_finite_do_not_reach_the_page(value: str, run: Path) -> None:
    """JSON has no NaN: a browser refused the whole page."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 41, "split": "train", "loss": {value}, "load": [[1, 0, 0, 0], [0, 0, 0, 1]]}}\n')
        file.write(f'{{"step": 42, "split": "train", "loss": 1, "load": [[1, 0, 0, {value}], [0, 0, 0, 1]]}}\n')
    trace = (run / "traces" / "step_00000020.json").read_text()
    odd = trace.replace('"step": 20', '"step": 30').replace('"entropy": [', f'"entropy": [{value}, ', 1)
    odd = re.sub(r'("entropy": \[.*?), [^,]*\]', r"\1]", odd, count=1)  # as many values as before
    assert odd.count(value) == 1
    (run / "traces" / "step_00000030.json").write_text(odd)
    curves = training_curves(run, open_run(run))
    json.dumps(curves, allow_nan=False)
    assert curves["traces"]["step"] == [20, 40]


def test_endless_metrics_are_refused_at_once(run: Path) -> None:
    """A file of 8 GiB that takes no room on the disk: each command read it for a minute."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.truncate(2**33)
    for read in (read_metrics, lambda run: RunFolder(run).truncate_logs_after(30, 30)):
        with pytest.raises(OSError, match="8,589,934,592 bytes, and at most") as refused:
            read(run)
        one_line(refused.value)
    assert last_train_record(Folder(run)) == {}


def test_an_odd_summary_is_as_none(run: Path, tmp_path: Path, monkeypatch) -> None:
    for text in ("[]", "null", '"text"', "[" * 200_000, "{", "\xff", '{"val_bits_per_byte": "low"}'):
        (run / "summary.json").write_text(text, encoding="latin-1")
        assert _Metrics(run).floor("nats per token") is None
        assert isinstance(read_summary(run), dict)
    monkeypatch.setattr("moe_jax.inspection.report.corpus_routing", lambda *_: None)
    write_report(run, tmp_path / "page.html", text="Once")


# config.json


ODD_CONFIGS: dict[str, Any] = {
    "200,000 brackets": "[" * 200_000,
    "no UTF-8": "\xff",
    "batch_size 4.0": ("train", "batch_size", 4.0),
    "a list of steps": ("train", "steps", [1]),
    "seq_len of 400 digits": ("model", "seq_len", 10**400),
    "lr of 400 digits": ("train", "lr", 10**400),
    "lr a text": ("train", "lr", "high"),
    "remat 1": ("execution", "remat", 1),
    "source a number": ("data", "source", 3),
    "train a list": (None, "train", []),
    "schema_version a list": (None, "schema_version", []),
    "schema 1, model a text": (None, "schema_version", 1),
}


@pytest.mark.parametrize("odd", ODD_CONFIGS)
def test_an_odd_config_is_refused_and_repaired(odd: str, run: Path) -> None:
    path, change = run / "config.json", ODD_CONFIGS[odd]
    expected = load_config(run)
    if isinstance(change, str):
        path.write_text(change, encoding="latin-1")
    else:
        section, name, value = change
        document = json.loads(path.read_text())
        (document[section] if section else document)[name] = value
        if odd.startswith("schema 1"):
            document["model"] = "text"
        path.write_text(json.dumps(document))
    with pytest.raises((UserError, ConfigError), match=r"config\.json|--") as caught:
        open_run(run)
    one_line(caught.value)
    assert {f.what: f.state for f in examine(run, repair=False)}["config.json"] == "damaged"
    assert {f.what: f.state for f in examine(run, repair=True)}["config.json"] == "repaired"
    assert load_config(run) == expected


@pytest.mark.parametrize(("section", "name", "value"), [("model", "layers", 4096), ("model", "seq_len", 2**20)])
def test_the_shapes_of_the_settings_are_compared_before_a_model_is_built(
    section: str, name: str, value: int, run: Path, monkeypatch
) -> None:
    """A model of 4,096 layers takes minutes to describe, and a context of 2^20 tokens takes any amount of memory."""

    def build(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("moe_jax.runs.load.abstract_model", build)
    document = json.loads((run / "config.json").read_text())
    document[section][name] = value
    (run / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"{name.replace('_', '-')} {value}: .* was saved with") as caught:
        open_run(run)
    one_line(caught.value)
    # The manifest says so too, with a right digest, and its arrays contradict it.
    reseal(run / "checkpoints" / "step_00000040", lambda m: m["context"]["config"][section].update({name: value}))
    if name == "layers":
        with pytest.raises(UserError, match="are not those of the model") as caught:
            open_run(run)
        one_line(caught.value)


# Manifests and arrays


def _context(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda m: m["context"].update(changes)


ODD_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "config deep": _context(config={"model": {"layers": 10**400}}),
    "data null": _context(data={}),
    "progress null": _context(progress=None),
    "progress of texts": _context(progress=RunCounters().to_json() | {"starved": ["a"]}),
    "best of 400 digits": _context(progress=RunCounters().to_json() | {"best": 10**400}),
    "origin a list": _context(origin=[]),
    "origin of 400 digits": _context(origin={"training_flops": 10**400}),
}


@pytest.mark.parametrize("odd", ODD_MANIFESTS)
def test_an_odd_manifest_with_a_right_digest(odd: str, run: Path) -> None:
    """It is refused in one line, or means what it says. Nothing raises any other error."""
    folder = run / "checkpoints" / "step_00000040"
    reseal(folder, _context(progress=RunCounters().to_json(), origin=None))
    reseal(folder, ODD_MANIFESTS[odd])
    said: list[str] = []
    config = load_config(run)
    store = CheckpointStore(run, say=said.append)
    any_text: Any = SimpleNamespace(digest=ANY)  # a store that is the text of everything
    for use in (
        lambda: open_run(run),
        lambda: [check_same_data_and_model(c, config, any_text) for c in store.list()],
        lambda: store.best(),
        lambda: [f.detail for f in examine(run, repair=False)],
    ):
        try:
            use()
        except (UserError, ConfigError) as error:
            one_line(error)
    assert all("\n" not in line for line in said)
    if odd in ("progress null", "best of 400 digits"):
        with pytest.raises(CheckpointCorrupted):
            check_same_data_and_model(store.list()[0], config, any_text)
