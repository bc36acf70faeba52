"""The curves of a run for the report: from metrics.jsonl, and the router's certainty at saved checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis.report_corpus import CorpusRouting
from moe_jax.training.run import Run, write_atomically

MOST_POINTS = 160


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


def training_curves(folder: Path, run: Run, corpus: CorpusRouting | None) -> dict[str, Any]:
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
        "val": {name: [r.get(name) for r in records["val"]] for name in ("step", "loss")},
        "certainty": _certainty(folder, run, corpus),
    }


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of shares float [..., E] over ln E: 1 is an even load, 0 one expert that takes all."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1e-12)
    nats = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
    return np.asarray(np.round(nats / math.log(max(load.shape[-1], 2)), 4))


def _certainty(folder: Path, run: Run, corpus: CorpusRouting | None) -> dict[str, Any]:
    """The router's entropy [steps][L] at every checkpoint that a report was written of, this one included. They are
    kept in report/entropy.json, so that a run which is resumed and reported again gets a curve."""
    path = folder / "report" / "entropy.json"
    try:
        known = {int(step): row for step, row in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        known = {}
    if corpus is not None:
        known[run.checkpoint.step] = np.round(corpus.entropy, 4).tolist()
        if path.parent.is_dir():
            write_atomically(path, json.dumps(known))
    steps = sorted(known)
    return {"step": steps, "entropy": [known[s] for s in steps]}
