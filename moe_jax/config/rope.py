"""Scaled rotations, which let a trained model read longer texts, as config.json of transformers names them.

linear   every frequency divided by a factor (Chen et al. 2023, "Position interpolation", equation 4)
llama3   only slow ones: those that turn less than `low_freq_factor` times within the original context; a blend up
         to `high_freq_factor` turns (Grattafiori et al. 2024, "Llama 3", section 3.1.1)
yarn     the same by a ramp over the pairs, and larger scores (Peng et al. 2024, "YaRN", sections 3.2 and 3.4)

Standard library only.
"""

import json
import math
from collections.abc import Iterator
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


def scaled_rotation(text: str, theta: float, width: int) -> tuple[list[float], float]:
    """For each pair of a head of `width`, the factor of its frequency; and the factor of cosine and sine. `theta` is
    the base, and `text` is `ModelConfig.rope_scaling`."""
    kind, numbers = rotation_numbers(text)
    factors = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[kind]
    return list(factors(numbers, theta, width)), numbers.get("attention_factor", 1.0)


def _linear(numbers: dict[str, float], theta: float, width: int) -> Iterator[float]:
    return (1 / numbers["factor"] for _ in range(width // 2))


def _llama3(numbers: dict[str, float], theta: float, width: int) -> Iterator[float]:
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    for pair in range(width // 2):
        turns = numbers[ORIGINAL] * theta ** (-2 * pair / width) / (2 * math.pi)
        kept = (turns - low) / (high - low) if high != low else float(turns > low)
        yield _blend(min(max(kept, 0.0), 1.0), numbers["factor"])


def _yarn(numbers: dict[str, float], theta: float, width: int) -> Iterator[float]:
    def pair_with(turns: float) -> float:
        """The pair that turns this often within the original context."""
        return width * math.log(numbers[ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(numbers["beta_fast"]), pair_with(numbers["beta_slow"])
    if numbers["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    for pair in range(width // 2):
        slowed = (pair - first) / (last - first or 0.001)
        yield _blend(1 - min(max(slowed, 0.0), 1.0), numbers["factor"])


def _blend(kept: float, factor: float) -> float:
    return kept + (1 - kept) / factor
