"""Scaled rotations, which let a trained model read longer texts, as config.json of transformers names them.

`model/rotation.py` has the formulas. Standard library only.
"""

import json
from typing import Any

ORIGINAL = "original_max_position_embeddings"
KINDS = {
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None, ORIGINAL: None},
    "yarn": {"factor": None, ORIGINAL: None, "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "truncate": 1},
}
"""Kind -> its numbers, with the values that may be left out."""


def rotation_numbers(text: str) -> tuple[str, dict[str, float]]:
    """The kind and the numbers of a rotation, as `ModelConfig.rope_scaling` holds them. Raises ValueError with what is
    allowed."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    numbers: dict[str, Any] = found if isinstance(found, dict) else {}
    kind = numbers.pop("rope_type", "")
    if kind not in KINDS:
        raise ValueError(f"an object with the rope_type {', '.join(KINDS)}")
    for name in KINDS[kind] | numbers:
        low, high = (0, 2**24) if name == "truncate" else (1e-6, 2**24)
        number = numbers.get(name)
        if name not in KINDS[kind] or not isinstance(number, int | float) or not low <= number <= high:
            raise ValueError(f"an object with {', '.join(KINDS[kind])}, each a number from {low:g} to {high:,}")
    return kind, numbers
