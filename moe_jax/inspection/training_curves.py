"""The curves of a run for the report: from metrics.jsonl, and from the routing saved at each evaluation."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.tokenizers import token_pieces
from moe_jax.runs.load import LoadedRun
from moe_jax.runs.records import load_entropy, read_metrics, read_snapshots

MOST_POINTS = 160
MOST_TRACES = 12
"""Most saved traces whose choices the page shows. The curves show all traces."""


def training_curves(folder: Path, run: LoadedRun) -> dict[str, Any]:
    """Values by step, at most MOST_POINTS steps. `load` is [steps][L][E]; `spread` is [L][steps], the load's entropy
    divided by ln E."""
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


def _traces(folder: Path, run: LoadedRun) -> dict[str, Any]:
    """What the page shows of the saved traces, each of the same n tokens.

    `entropy` and `drop` [L][steps]. `same` [L][steps]: the share of tokens whose first choice is the same as in the
    trace before; null for the first trace. `shown`: the text of the tokens, and their first choices [steps][L][n] at
    no more than MOST_TRACES steps, the last one included.
    """
    found = read_snapshots(folder)
    if not found:
        return {"step": []}
    first = np.array([[layer[:: run.config.model.routing.top_k] for layer in trace["expert"]] for trace in found])
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
