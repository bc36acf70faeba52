"""Read metrics.jsonl: one record a line, each with a `step` and a `split` ("train" or "val")."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

_TAIL_BYTES = 2**15


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run's metrics.jsonl by split. A line that a crash cut short is left out."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            record = json.loads(line)
            found[record["split"]].append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def last_train_record(metrics: Path) -> dict[str, Any]:
    """The newest record of the training split in a metrics.jsonl. Empty if there is none.

    Reads the file from its end, so that time and memory do not grow with the length of the run.
    """
    if not metrics.exists():
        return {}
    with metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = min(_TAIL_BYTES, size)
        while True:
            file.seek(size - tail)
            lines = file.read(tail).splitlines()
            for line in reversed(lines if tail == size else lines[1:]):  # the first may be cut
                record = json.loads(line)
                if record["split"] == "train":
                    return record
            if tail == size:
                return {}
            tail = min(4 * tail, size)


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of the load float [..., E], divided by ln E. 1: all experts have the same load; 0: one expert has all."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1e-12)
    nats = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
    return np.asarray(np.round(nats / math.log(max(load.shape[-1], 2)), 4))
