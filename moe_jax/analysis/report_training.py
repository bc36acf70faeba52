"""The curves of a run for the report: from metrics.jsonl, and from the routing saved at each evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis.routing_trace import token_pieces
from moe_jax.analysis.saved_traces import read_traces
from moe_jax.training.run import Run

MOST_POINTS = 160
MOST_TRACES = 12
"""Saved traces whose choices the page shows; their curves show all."""


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The whole records of metrics.jsonl by split; a line that a crash cut short is left out."""
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


def training_curves(folder: Path, run: Run) -> dict[str, Any]:
    """Columns by step, at most MOST_POINTS of them; load [steps][L][E], and `spread` [L][steps], its entropy over
    ln E."""
    records = read_metrics(folder)
    train = [r for r in records["train"] if r.get("load")]
    train = [train[i] for i in np.unique(np.linspace(0, len(train) - 1, MOST_POINTS).astype(int))] if train else []
    load = [r["load"] for r in train]
    return {
        "step": [r["step"] for r in train],
        **{name: [r.get(name) for r in train] for name in ("loss", "balance_loss", "drop_fraction")},
        "load": load,
        "spread": load_entropy(np.array(load)).T.tolist() if load else [],
        "val": {name: [r.get(name) for r in records["val"]] for name in ("step", "loss", "bits_per_byte")},
        "traces": _traces(folder, run),
    }


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of shares float [..., E] over ln E: 1 is an even load, 0 one expert that takes all."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1e-12)
    nats = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
    return np.asarray(np.round(nats / math.log(max(load.shape[-1], 2)), 4))


def _traces(folder: Path, run: Run) -> dict[str, Any]:
    """Of the saved traces: `entropy` and `drop` [L][steps]; `same` [L][steps], the share of the shown tokens whose
    first choice is that of the trace before, null for the first; `shown`, the pieces of these tokens and their first
    choices [steps][L][n] at MOST_TRACES steps, the last one included."""
    found = read_traces(folder)
    if not found:
        return {"step": []}
    first = np.array([[layer[:: run.config.model.top_k] for layer in trace["expert"]] for trace in found])
    same = (first[1:] == first[:-1]).mean(2).round(4).T.tolist()
    picked = np.unique(np.linspace(0, len(found) - 1, MOST_TRACES).astype(int))
    return {
        "step": [trace["step"] for trace in found],
        **{name: np.array([trace[name] for trace in found]).T.tolist() for name in ("entropy", "drop")},
        "same": [[None, *row] for row in same],
        "shown": {
            "pieces": token_pieces(run.tokenizer, np.array(found[-1]["tokens"], np.int32)),
            "step": [found[i]["step"] for i in picked],
            "first": first[picked].tolist(),
        },
    }
