"""Read metrics.jsonl: one record a line, each with a `step` and a `split` ("train" or "val").

A crash, a disk or an editor may have left anything in a line. A line that is not a record is left out everywhere, so
that it never stops a run.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.system.folders import Folder, parse_json

NAME = "metrics.jsonl"
MAX_LINE_BYTES = 2**24
"""Longest line that is taken for a record. With 4,096 experts in 64 layers a record has 2 MB."""
_MAX_BYTES = 2**31
"""Longest metrics.jsonl that is read whole. A longer one takes minutes, and can be made without any room on a disk."""
_TAIL_BYTES = 2**15
_MOST_TAIL_BYTES = 2**27
_NUMBERS = (
    *("loss", "balance_loss", "z_loss", "drop_fraction", "grad_norm", "lr", "bits_per_byte"),
    *("tokens", "tokens_seen", "tokens_per_second", "wall_seconds"),
)
"""Fields of a record that are a number, or null for a number that was not finite."""


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None for a line that is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("split") not in ("train", "val"):
        return None
    step = record.get("step")
    whole = type(step) is int and 0 <= step < 2**53
    whole = whole and all(_is_number(record[name]) for name in _NUMBERS if name in record)
    return record if whole and _is_load(record.get("load", [])) else None


def _is_number(value: Any) -> bool:
    return value is None or _is_finite(value)


def _is_load(load: Any) -> bool:
    """Whether a value is a list [L][E] of numbers."""
    if not isinstance(load, list) or not all(isinstance(layer, list) for layer in load):
        return False
    return len({len(layer) for layer in load}) <= 1 and all(_is_finite(x) for layer in load for x in layer)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**1000


def record_lines(folder: Folder) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a run's metrics.jsonl as it is, and its record or None. Nothing if there is no file.

    Raises OSError if the file cannot be read, is no plain file, or has more than _MAX_BYTES bytes.
    """
    try:
        file = folder.open(NAME, _MAX_BYTES)
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
    found: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for _, record in record_lines(Folder(folder)):
        if record is not None:
            found[record["split"]].append(record)
    loads = [record for record in found["train"] if record.get("load")]
    for record in loads:
        if not all(record["load"]) or _shape(record["load"]) != _shape(loads[-1]["load"]):
            del record["load"]
    return found


def _shape(load: list[list[float]]) -> tuple[int, int]:
    return len(load), len(load[0])


def last_train_record(folder: Folder) -> dict[str, Any]:
    """The newest record of the training split in a run's metrics.jsonl. Empty if there is none.

    Reads the file from its end, so that time and memory do not grow with the length of the run.
    """
    try:
        file = folder.open(NAME)
    except FileNotFoundError:
        return {}
    with file:
        size = file.seek(0, os.SEEK_END)
        tail = min(_TAIL_BYTES, size)
        while True:
            file.seek(size - tail)
            lines = file.read(tail).splitlines()
            for line in reversed(lines if tail == size else lines[1:]):  # the first may be cut
                record = parse_record(line)
                if record is not None and record["split"] == "train":
                    return record
            if tail == size or tail > _MOST_TAIL_BYTES:
                return {}
            tail = min(4 * tail, size)


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of the load float [..., E], divided by ln E and rounded to 4 decimals. 1: all experts have the same load;
    0: one expert has all."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1e-12)
    nats = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
    return np.asarray(np.round(nats / math.log(max(load.shape[-1], 2)), 4) + 0.0)  # no -0.0, which is shown as -0.000
