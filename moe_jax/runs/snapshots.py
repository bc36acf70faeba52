"""Read the routing snapshots of a run: the decisions of its routers on the same tokens, at each evaluation.

`RUN/traces/step_00000200.json` holds

    step, tokens            the step, and the ids of the first tokens of the validation text
    expert                  for each layer a flat list of the experts that these n tokens chose, n*K numbers
    load, entropy, drop     [L][E], [L], [L], over a longer part of the validation text

`training/routing_snapshot.py` makes them.
"""

import json
from pathlib import Path
from typing import Any


def read_snapshots(folder: Path) -> list[dict[str, Any]]:
    """The snapshots of a run, earliest first. A damaged one is left out."""
    found = []
    for path in sorted((folder / "traces").glob("step_*.json")):
        try:
            trace = json.loads(path.read_text(encoding="utf-8"))
            found.append({name: trace[name] for name in ("step", "tokens", "expert", "load", "entropy", "drop")})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda trace: trace["step"])
