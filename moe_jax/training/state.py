"""The state of training: on the device, one value that a step takes and returns (`TrainState`); on the host, counters
for evaluations, skipped steps and starved experts (`RunCounters`).

A checkpoint holds both, so that a resumed run makes the same decisions as an uninterrupted run.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import RunConfig
from moe_jax.model.low_rank import Adapters
from moe_jax.model.precision import at_least_float32, to_param_dtype
from moe_jax.model.transformer import Params, create, split
from moe_jax.runs.manifest import CheckpointCorrupted

INITIAL_SCALE = 2.0**15
"""The loss scale of the first step with float16."""
GROWTH_STEPS = 2000
"""Finite steps in a row after which the loss scale doubles."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2). The scale doubles after 2,000 finite steps in a
    row, and halves after a step that is not finite. It is constantly 1 unless the compute precision is float16. A power
    of two cancels exactly: chapter 17 of `foundation`."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    """Finite steps in a row since the scale last changed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of training. A checkpoint holds all of it. The position in the data is a function of `step` alone."""

    step: Int[Array, ""]
    """Steps taken, skipped ones included."""
    params: Params
    optimizer: Any
    loss_scale: LossScale
    skipped: Int[Array, ""]
    """Number of skipped steps. A skipped step changes no bit of parameters and optimizer: its loss or gradient was not
    finite."""
    adapters: Adapters | None = None
    """Low-rank adapters (`model/low_rank.py`). If there are any, only they are trained, and the parameters stay."""

    @property
    def trained(self) -> Params:
        """What a step changes: the adapters, or else the parameters."""
        return self.params if self.adapters is None else self.adapters

    @property
    def frozen(self) -> Params | None:
        """The parameters, if they stay as they are."""
        return None if self.adapters is None else self.params


def initial_params(config: RunConfig, key: Key[Array, ""]) -> Params:
    """Random parameters in the dtypes that they are stored in."""

    def make(key: Array) -> Params:
        return to_param_dtype(split(create(config.model, key))[1], config.train.param_dtype)

    # Compiled as one program, so that bfloat16 parameters are written directly. Otherwise float32 copies of all of
    # them, twice as large, would exist first.
    return make(key) if config.train.param_dtype == "float32" else jax.jit(make)(key)


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, loss_scaling: bool, adapters: Adapters | None = None
) -> TrainState:
    """The state before the first step. The optimizer has a state for what is trained: the adapters if there are any."""
    trained = params if adapters is None else adapters
    scale = INITIAL_SCALE if loss_scaling else 1.0
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(jax.tree.map(lambda p: p.astype(at_least_float32(p.dtype)), trained)),
        loss_scale=LossScale(jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32)),
        skipped=jnp.zeros((), jnp.int32),
        adapters=adapters,
    )


def next_scale(old: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """The scale after a step whose gradient was finite, or was not."""
    good = jnp.where(finite, old.good_steps + 1, 0)
    grow = good >= GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grow, old.scale * 2, old.scale), jnp.maximum(old.scale / 2, 1))
    return LossScale(scale, jnp.where(grow, 0, good))


# The progress of a run on the host

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

    @property
    def mean_drop(self) -> float | None:
        """Mean drop fraction of the counted steps; None before the first."""
        return self.drop_sum / self.drop_steps if self.drop_steps else None

    def add_step(self, load: np.ndarray, drop_fraction: float, finite: bool) -> list[tuple[int, int]]:
        """Count a step: its load float [L, E], shares that sum to 1 in each layer; the share of its (token, choice)
        pairs without a slot, mean over layers; and whether it was finite. If not, the first two do not count.

        Returns the (layer, expert) pairs that have now been starved for exactly STARVED_STEPS steps in a row.
        """
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            return []
        self.drop_steps += 1
        self.drop_sum += drop_fraction
        if not load.size:
            return []
        before = np.asarray(self.starved, np.int64) if self.starved else np.zeros(load.shape, np.int64)
        steps = np.where(load < STARVED_SHARE / load.shape[1], before + 1, 0)
        self.starved = steps.tolist()
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(steps == STARVED_STEPS)]

    def add_evaluation(self, step: int, loss: float) -> bool:
        """Count an evaluation; returns whether it is the best so far."""
        improved = loss < (math.inf if self.best is None else self.best)
        self.best = loss if improved else self.best
        self.without_improvement = 0 if improved else self.without_improvement + 1
        self.evaluated = step
        return improved

    def starved_now(self) -> list[list[int]]:
        """[layer, expert] of every expert that has been starved for at least STARVED_STEPS steps in a row."""
        return np.argwhere(np.asarray(self.starved) >= STARVED_STEPS).tolist() if self.starved else []

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "RunCounters":
        """The inverse of `to_json`. Raises CheckpointCorrupted if the values have other names."""
        try:
            return cls(**values)
        except TypeError:
            raise CheckpointCorrupted("its progress is not what this program saves") from None
