"""What training has written, read again: metrics.jsonl, summary.json and the routing snapshots.

A crash, a disk or an editor may have left anything in these files. A line or a value that is not what it should be is
left out everywhere, so that it never stops a run or a report.

metrics.jsonl has one record a line, each with a `step` and a `split` ("train" or "val"). `training/logging.py`
describes summary.json. `traces/step_00000200.json` (written by `training/evaluate.py`) holds

    step, tokens            the step, and the ids of the first tokens of the validation text
    expert                  for each layer a flat list of the experts that these n tokens chose, n*K numbers
    load, entropy, drop     [L][E], [L], [L], over a longer part of the validation text
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.system.files import Folder, parse_json, step_number

METRICS, SUMMARY, TRACES = "metrics.jsonl", "summary.json", "traces"
MAX_LINE_BYTES = 2**24
"""Longest line that is taken for a record. With 4,096 experts in 64 layers a record has 2 MB."""
LARGEST_STEP = 2**53 - 1
_MAX_BYTES = 2**31
"""Longest metrics.jsonl that is read whole. A longer one takes minutes, and can be made without any room on a disk."""
_NUMBERS = (
    *("loss", "balance_loss", "z_loss", "drop_fraction", "grad_norm", "lr", "bits_per_byte"),
    *("tokens", "tokens_seen", "tokens_per_second", "wall_seconds"),
)
"""Fields of a record that are a number, or null for a number that was not finite."""
_TEXTS = ("preset", "device", "precision", "opening", "val_stream", "val_scored", "weights")
"""Fields of the summary that are texts."""
_RANKS = {"tokens": 1, "expert": 2, "load": 2, "entropy": 1, "drop": 1}
"""Number of axes of each field of a snapshot that is an array."""


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None for a line that is none."""
    try:
        record = parse_json(line)
        step, load = record["step"], record.get("load", [])
        numbers = [record[name] for name in _NUMBERS if record.get(name) is not None]
        numbers += [share for layer in load for share in layer]
        usual = record["split"] in ("train", "val") and type(step) is int and 0 <= step <= LARGEST_STEP
        usual = usual and all(map(_is_finite, numbers)) and len({len(layer) for layer in load}) <= 1
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return record if usual else None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**1000


def record_lines(folder: Folder) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a run's metrics.jsonl as it is, and its record or None. Nothing if there is no file.

    Raises OSError if the file cannot be read, is no plain file, or has more than _MAX_BYTES bytes.
    """
    try:
        file = folder.open(METRICS, _MAX_BYTES)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(MAX_LINE_BYTES):
            yield line, parse_record(line)


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run's metrics.jsonl by split. Raises OSError if the file is there and cannot be read.

    All loads have the shape of the newest one: readers put them into one array. From another record, perhaps of another
    run, the load is left out.
    """
    records: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for _, record in record_lines(Folder(folder)):
        if record is not None:
            records[record["split"]].append(record)
    loads = [record for record in records["train"] if record.get("load")]
    for record in loads:
        if not all(record["load"]) or np.shape(record["load"]) != np.shape(loads[-1]["load"]):
            del record["load"]
    return records


def last_train_record(folder: Folder) -> dict[str, Any]:
    """The newest record of the training split in a run's metrics.jsonl. Empty if there is none, or if the file cannot
    be read."""
    last: dict[str, Any] = {}
    with suppress(OSError):
        for _, record in record_lines(folder):
            if record is not None and record["split"] == "train":
                last = record
    return last


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of the load float [..., E], divided by ln E and rounded to 4 decimals. 1: all experts have the same load;
    0: one expert has all."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1e-12)
    nats = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
    return np.asarray(np.round(nats / math.log(max(load.shape[-1], 2)), 4) + 0.0)  # no -0.0, which is shown as -0.000


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run. Empty if there is none, or if it is no JSON object. A value of a wrong type is left out.

    Raises OSError if the file is there and cannot be read.
    """
    try:
        summary = Folder(folder).read_json(SUMMARY)
    except (FileNotFoundError, ValueError):
        return {}
    return {k: v for k, v in summary.items() if _is_usual(k, v)} if isinstance(summary, dict) else {}


def _is_usual(name: str, value: Any) -> bool:
    if name in _TEXTS:
        return isinstance(value, str)
    if name == "openings":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return value is None or isinstance(value, bool) or _is_finite(value)


def snapshot_steps(folder: Folder) -> dict[int, str]:
    """Step -> name of its snapshot below the run's folder, earliest first. Files with other names are left out."""
    names = [name.removesuffix(".json") for name in folder.names(TRACES) if name.endswith(".json")]
    steps = {step: name for name in names if (step := step_number(name)) is not None}
    return {step: f"{TRACES}/{steps[step]}.json" for step in sorted(steps)}


def read_snapshots(folder: Path) -> list[dict[str, Any]]:
    """The snapshots of a run, earliest first. One that is damaged, or of another shape than the last, is left out."""
    run, snapshots = Folder(folder), []
    for step, name in snapshot_steps(run).items():
        try:
            trace = run.read_json(name)
            arrays = {key: np.array(trace[key]) for key in _RANKS}
            usual = trace["step"] == step and all(np.isfinite(a).all() for a in arrays.values())
        except (ValueError, LookupError, TypeError):
            continue
        ids = (arrays["tokens"], arrays["expert"])
        usual = usual and all(i.dtype.kind == "i" and i.size and 0 <= i.min() <= i.max() < 2**24 for i in ids)
        if usual and all(arrays[key].ndim == rank for key, rank in _RANKS.items()):
            snapshots.append(([a.shape for a in arrays.values()], {key: trace[key] for key in ("step", *_RANKS)}))
    return [trace for shapes, trace in snapshots if shapes == snapshots[-1][0]]
