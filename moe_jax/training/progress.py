"""What the loop remembers from step to step beside the state on the device. Saved with each checkpoint, as JSON, so
that a resumed run decides everything as the uninterrupted one does."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_jax.training.manifest import Damaged

STARVED_SHARE = 0.05
"""An expert with less than this part of its fair share of the (token, choice) pairs is starved at a step."""
STARVED_STEPS = 100
"""Steps in a row after which that is worth saying."""


@dataclass
class Progress:
    """Counters of one run."""

    best: float | None = None
    """Lowest validation loss so far, in nats per token; None before the first evaluation."""
    without_improvement: int = 0
    """Evaluations since the best one."""
    evaluated: int = 0
    """Last step that was evaluated."""
    skipped_in_a_row: int = 0
    """Steps whose loss or gradient was not finite, up to now without a finite one between."""
    starved: list[list[int]] = field(default_factory=list)
    """[L, E]: steps in a row at which the expert was starved."""

    def add_evaluation(self, step: int, loss: float) -> bool:
        """Count an evaluation; returns whether it is the best so far."""
        improved = loss < (math.inf if self.best is None else self.best)
        self.best = loss if improved else self.best
        self.without_improvement = 0 if improved else self.without_improvement + 1
        self.evaluated = step
        return improved

    def add_load(self, load: np.ndarray) -> list[tuple[int, int]]:
        """Count a step's load, float [L, E], shares that sum to 1 in each layer. Returns the (layer, expert) pairs
        that have now been starved for STARVED_STEPS steps in a row."""
        if not load.size:
            return []
        before = np.asarray(self.starved, np.int64) if self.starved else np.zeros(load.shape, np.int64)
        steps = np.where(load < STARVED_SHARE / load.shape[1], before + 1, 0)
        self.starved = steps.tolist()
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(steps == STARVED_STEPS)]

    def starved_now(self) -> list[list[int]]:
        """[layer, expert] of every expert that has been starved for STARVED_STEPS steps in a row or more."""
        return np.argwhere(np.asarray(self.starved) >= STARVED_STEPS).tolist() if self.starved else []

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Progress":
        """The inverse of `to_json`. Raises Damaged where the values are none that it gives."""
        kinds = {
            "best": float | None,
            "without_improvement": int,
            "evaluated": int,
            "skipped_in_a_row": int,
            "starved": list,
        }
        if not isinstance(values, dict) or set(values) != set(kinds):
            raise Damaged("its progress is not what this program saves")
        if not all(isinstance(values[name], kind) for name, kind in kinds.items()):
            raise Damaged("its progress is not what this program saves")
        return cls(**values)
