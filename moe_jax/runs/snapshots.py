"""Read the routing snapshots of a run: the decisions of its routers on the same tokens, at each evaluation.

`RUN/traces/step_00000200.json` holds

    step, tokens            the step, and the ids of the first tokens of the validation text
    expert                  for each layer a flat list of the experts that these n tokens chose, n*K numbers
    load, entropy, drop     [L][E], [L], [L], over a longer part of the validation text

`training/routing_snapshot.py` makes them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.system.folders import Folder
from moe_jax.system.step_names import step_number

FOLDER = "traces"
_RANKS = {"tokens": 1, "expert": 2, "load": 2, "entropy": 1, "drop": 1}
"""Number of axes of each field that is an array."""


def snapshot_steps(folder: Folder) -> dict[int, str]:
    """Step -> name of its snapshot below the run's folder, earliest first. Files with other names are left out."""
    names = [name.removesuffix(".json") for name in folder.names(FOLDER) if name.endswith(".json")]
    steps = {step: name for name in names if (step := step_number(name)) is not None}
    return {step: f"{FOLDER}/{steps[step]}.json" for step in sorted(steps)}


def read_snapshots(folder: Path) -> list[dict[str, Any]]:
    """The snapshots of a run, earliest first. One that is damaged, or of another shape than the last, is left out."""
    run, found = Folder(folder), []
    for step, name in snapshot_steps(run).items():
        try:
            trace = run.read_json(name)
            arrays = {key: np.array(trace[key]) for key in _RANKS}
        except (ValueError, LookupError, TypeError):
            continue
        ids = (arrays["tokens"], arrays["expert"])
        usual = all(i.dtype.kind == "i" and i.size and 0 <= i.min() <= i.max() < 2**24 for i in ids)
        usual = usual and all(
            arrays[key].ndim == rank and arrays[key].dtype.kind in "if" and np.isfinite(arrays[key]).all()
            for key, rank in _RANKS.items()
        )
        if usual and trace.get("step") == step:
            found.append(({key: a.shape for key, a in arrays.items()}, {key: trace[key] for key in ("step", *_RANKS)}))
    return [trace for shapes, trace in found if shapes == found[-1][0]]
