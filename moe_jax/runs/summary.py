"""Read summary.json, which `training/summary.py` describes."""

from pathlib import Path
from typing import Any

from moe_jax.system.folders import Folder

NAME = "summary.json"
_TEXTS = ("preset", "device", "precision", "opening", "val_stream", "val_scored", "weights")


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run. Empty if there is none, or if it is no JSON object. A value of a wrong type is left out.

    Raises OSError if the file is there and cannot be read.
    """
    try:
        found = Folder(folder).read_json(NAME)
    except (FileNotFoundError, ValueError):
        return {}
    return {k: v for k, v in found.items() if _is_usual(k, v)} if isinstance(found, dict) else {}


def _is_usual(name: str, value: Any) -> bool:
    if name in _TEXTS:
        return isinstance(value, str)
    if name == "openings":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 2**1000)
