"""The learner's folder: the files with derivations, and one file that remembers hints and scores."""

import copy
import json
from pathlib import Path
from typing import Any

FOLDER = Path("derivations")
_SCORE = "score.json"
_HUNT = {"planted": "", "failed": [], "before": [], "tries": 0, "found": 0, "given_up": 0}
_EMPTY = {"derived": [], "hints": {}, "hunt": _HUNT}


def read_score(folder: Path) -> dict[str, Any]:
    """{"derived": [operations], "hints": {operation: shown}, "hunt": {...}}; each is empty where the file has none, or
    something of another type."""
    try:
        found = json.loads((folder / _SCORE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = {}
    return _like(_EMPTY, found)


def _like(empty: Any, found: Any) -> Any:
    """What was found, and the empty value where there is none of its type."""
    if not isinstance(found, type(empty)):
        return copy.deepcopy(empty)
    return {key: _like(value, found.get(key)) for key, value in empty.items()} if empty else found


def write_score(folder: Path, score: dict[str, Any]) -> None:
    """Keeps the score. A folder that cannot be written costs the score, and not the answer."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SCORE).write_text(json.dumps(score, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"(the score is not kept: {folder} cannot be written: {error.strerror})")
