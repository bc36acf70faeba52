"""The learner's folder: the files with derivations, and one file that remembers hints and scores."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path("derivations")
_SCORE = "score.json"


def read_score(folder: Path) -> dict[str, Any]:
    """{"derived": [operations], "hints": {operation: shown}, "hunt": {...}}; empty where there is none, or no JSON."""
    try:
        found = json.loads((folder / _SCORE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = {}
    kinds = {"derived": list, "hints": dict, "hunt": dict}
    found = found if isinstance(found, dict) else {}
    return {key: found[key] if isinstance(found.get(key), kind) else kind() for key, kind in kinds.items()}


def write_score(folder: Path, score: dict[str, Any]) -> None:
    """Keeps the score. A folder that cannot be written costs the score, and not the answer."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SCORE).write_text(json.dumps(score, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"(the score is not kept: {folder} cannot be written: {error.strerror})")
