"""What training has written, read again: metrics.jsonl, summary.json and the routing snapshots.

metrics.jsonl has one record a line, each with a `step` and a `split` ("train" or "val"). `training/logging.py`
describes summary.json. `traces/step_00000200.json` (written by `training/evaluate.py`) holds

    step, tokens            the step, and the ids of the first tokens of the validation text
    expert                  for each layer a flat list of the experts that these n tokens chose, n*K numbers
    load, entropy, drop     [L][E], [L], [L], over a longer part of the validation text

A crash may leave the last line of metrics.jsonl incomplete. A line that is no record is left out everywhere.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax.config import UserError
from moe_jax.system.files import parse_json, read_json, steps_in

METRICS, SUMMARY, TRACES = "metrics.jsonl", "summary.json", "traces"


def record_lines(run: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every record of a run's metrics.jsonl, with its line. Nothing if there is no file. Raises OSError if it cannot be
    read."""
    try:
        file = (run / METRICS).open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                record = parse_json(line)
            except ValueError:
                continue
            usual = isinstance(record, dict) and isinstance(record.get("step"), int)
            if usual and record.get("split") in ("train", "val"):
                yield line, record


def read_metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run's metrics.jsonl by split. Raises OSError if the file is there and cannot be read."""
    records: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for _, record in record_lines(run):
        records[record["split"]].append(record)
    return records


def last_train_record(run: Path) -> dict[str, Any]:
    """The newest record of the training split in a run's metrics.jsonl. Empty if there is none."""
    return next(reversed(read_metrics(run)["train"]), {})


def read_summary(run: Path) -> dict[str, Any]:
    """The summary of a run. Empty if there is none. Raises UserError if it is no JSON object, and OSError if it cannot
    be read."""
    path = run / SUMMARY
    summary = _parsed(path) if path.is_file() else {}
    if not isinstance(summary, dict):
        raise UserError(f"{path}: is no JSON object, so it was changed; remove it, or put the file of the run back")
    return summary


def read_snapshots(run: Path) -> list[dict[str, Any]]:
    """The snapshots of a run, earliest first. Raises the errors of `read_summary`."""
    return [_parsed(path) for path in steps_in(run / TRACES, ".json").values()]


def _parsed(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        raise UserError(f"{path}: is not JSON, so it was changed; remove it, or put the file of the run back") from None
