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

from moe_jax.system.files import json_text

ORIGINAL = "original_max_position_embeddings"
KINDS = {
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None, ORIGINAL: None},
    "yarn": {"factor": None, ORIGINAL: None, "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "truncate": 1},
}
"""Kind -> its numbers, with the values that may be left out."""


def scaling_text(rope: dict[str, Any], longest: int) -> str:
    """What `ModelConfig.rope_scaling` holds for the object `rope_scaling` of a config.json, whose model reads `longest`
    positions. Raises ValueError for a number that is missing, and for a field that is not known."""
    values = {name: value for name, value in rope.items() if value is not None}
    kind = values.pop("rope_type", values.pop("type", None))
    values.pop("type", None)
    numbers = KINDS[kind] | ({ORIGINAL: longest} if kind == "yarn" else {}) | values
    if kind == "yarn":
        one, other = (numbers.pop(name, 0) for name in ("mscale", "mscale_all_dim"))
        growth = 0.1 * math.log(max(numbers["factor"] or 1, 1))
        size = (1 + one * growth) / (1 + other * growth) if one and other else 1 + growth
        numbers["attention_factor"] = values.get("attention_factor", size)
    return json_text({"rope_type": kind} | {name: numbers[name] for name in sorted(numbers)})


def scaled_rotation(text: str, theta: float, width: int) -> tuple[list[float], float]:
    """For each pair of a head of `width`, the factor of its frequency; and the factor of cosine and sine. Raises
    ValueError."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("rope_type") not in KINDS:
        raise ValueError(f"an object with the rope_type {', '.join(KINDS)}")
    names = KINDS[values["rope_type"]]
    numbers = {name: value for name, value in values.items() if name != "rope_type"}
    for name in names | numbers:
        low, high = (0, 2**24) if name == "truncate" else (1e-6, 2**24)
        number = numbers.get(name)
        if name not in names or not isinstance(number, int | float) or not low <= number <= high:
            raise ValueError(f"an object with {', '.join(names)}, each a number from {low:g} to {high:,}")
    factors = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[values["rope_type"]]
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
