"""The progress of a run on the host: counters for evaluations, skipped steps and starved experts, and its time.

The counters are saved as JSON with each checkpoint, so that a resumed run makes the same decisions as an uninterrupted
run.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_jax.runs.checkpoint import Checkpoint, CheckpointCorrupted

STARVED_SHARE = 0.05
"""An expert is starved in a step if it gets less than this share of its fair share 1 / E of the (token, choice) pairs.
"""
STARVED_STEPS = 100
"""After this many starved steps in a row, the run prints a warning."""


@dataclass
class RunCounters:
    """Counters of one run."""

    best: float | None = None
    """Lowest validation loss so far, in nats per token; None before the first evaluation."""
    without_improvement: int = 0
    """Evaluations since the best one."""
    evaluated: int = 0
    """Last step that was evaluated."""
    skipped_in_a_row: int = 0
    """Number of latest steps in a row whose loss or gradient was not finite."""
    starved: list[list[int]] = field(default_factory=list)
    """[L, E]: steps in a row at which the expert was starved."""
    drop_steps: int = 0
    """Steps whose drops are counted: all finite steps."""
    drop_sum: float = 0.0
    """Sum of the drop fractions of these steps."""
    worst_drop: float | None = None
    """Largest drop fraction of these steps; None before the first."""
    last_drop: float | None = None
    """Drop fraction of the newest of these steps; None before the first."""

    @property
    def mean_drop(self) -> float | None:
        """Mean drop fraction of the counted steps; None before the first."""
        return self.drop_sum / self.drop_steps if self.drop_steps else None

    def add_drops(self, fraction: float) -> None:
        """Count the drops of a step: the share of (token, choice) pairs without a slot, mean over layers."""
        self.drop_steps += 1
        self.drop_sum += fraction
        self.worst_drop = max(fraction, fraction if self.worst_drop is None else self.worst_drop)
        self.last_drop = fraction

    def add_evaluation(self, step: int, loss: float) -> bool:
        """Count an evaluation; returns whether it is the best so far."""
        improved = loss < (math.inf if self.best is None else self.best)
        self.best = loss if improved else self.best
        self.without_improvement = 0 if improved else self.without_improvement + 1
        self.evaluated = step
        return improved

    def add_load(self, load: np.ndarray) -> list[tuple[int, int]]:
        """Count a step's load float [L, E], shares that sum to 1 in each layer.

        Returns the (layer, expert) pairs that have now been starved for exactly STARVED_STEPS steps in a row.
        """
        if not load.size:
            return []
        before = np.asarray(self.starved, np.int64) if self.starved else np.zeros(load.shape, np.int64)
        steps = np.where(load < STARVED_SHARE / load.shape[1], before + 1, 0)
        self.starved = steps.tolist()
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(steps == STARVED_STEPS)]

    def starved_now(self) -> list[list[int]]:
        """[layer, expert] of every expert that has been starved for at least STARVED_STEPS steps in a row."""
        return np.argwhere(np.asarray(self.starved) >= STARVED_STEPS).tolist() if self.starved else []

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "RunCounters":
        """The inverse of `to_json`. Raises CheckpointCorrupted if the values have other names or types."""
        usual = cls().to_json()
        kinds = {name: float | None if value is None else type(value) for name, value in usual.items()}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise CheckpointCorrupted("its progress is not what this program saves")
        if wrong := [name for name, kind in kinds.items() if not isinstance(values[name], kind)]:
            raise CheckpointCorrupted(f"its progress has a wrong value for {wrong[0]}")
        return cls(**values)


@dataclass
class SessionProgress:
    """The progress of the run, in this process and in all earlier ones."""

    counters: RunCounters
    begin: float
    """`time.monotonic()` at the start of this process's work."""
    resumed_from: int | None = None
    saved_step: int = 0
    """Step of the newest checkpoint; 0 before the first."""
    elapsed_before: float = 0.0
    """Seconds of the run before this process."""
    origin: dict[str, Any] | None = None
    """`Initial.origin` of a run that was upcycled, imported or fine-tuned. Else None."""

    @property
    def elapsed(self) -> float:
        """Seconds of the run, summed over all its processes."""
        return self.elapsed_before + time.monotonic() - self.begin

    @property
    def how_to_go_on(self) -> str:
        """What the user can do after an error."""
        return "go on from the last checkpoint with --resume" if self.saved_step else "start again with --resume"

    @classmethod
    def restored(cls, checkpoint: Checkpoint, begin: float) -> "SessionProgress":
        """The progress that was saved with a checkpoint."""
        context = checkpoint.manifest["context"]
        return cls(
            RunCounters.from_json(context["progress"]),
            begin,
            resumed_from=checkpoint.step,
            saved_step=checkpoint.step,
            elapsed_before=checkpoint.elapsed,
            origin=context.get("origin"),
        )
