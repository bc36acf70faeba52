"""The state of training on the device, as one value that a step takes and returns."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import RunConfig
from moe_jax.model.low_rank import Adapters
from moe_jax.model.precision import at_least_float32, to_param_dtype
from moe_jax.model.transformer import Params, create, split

INITIAL_SCALE = 2.0**15
"""The loss scale of the first step with float16."""
GROWTH_STEPS = 2000
"""Finite steps in a row after which the loss scale doubles."""

SPIKE_DECAY = 1 - 1 / 128
"""Weight of the former mean and variance of the loss when a step is added."""
SPIKE_AFTER = 128
"""Number of first steps in which no loss is called a spike, because the mean is not yet known well."""
SPIKE_SIGMAS = 6.0
"""Standard deviations above the mean from which a loss is a spike."""


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
class LossTrack:
    """Running mean and variance of the loss, with exponential decay: the half-life is 88 steps."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]
    steps: Int[Array, ""]

    def limit(self) -> Float[Array, ""]:
        """The loss above which a step is a spike; infinite for the first SPIKE_AFTER steps."""
        limit = self.mean + SPIKE_SIGMAS * jnp.sqrt(self.variance)
        return jnp.where(self.steps >= SPIKE_AFTER, limit, jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of training. A checkpoint holds all of it. The position in the data is a function of `step` alone."""

    step: Int[Array, ""]
    """Steps taken, skipped ones included."""
    params: Params
    optimizer: Any
    loss_scale: LossScale
    loss_track: LossTrack
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
        loss_track=LossTrack(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)),
        skipped=jnp.zeros((), jnp.int32),
        adapters=adapters,
    )


def next_scale(old: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """The scale after a step whose gradient was finite, or was not."""
    good = jnp.where(finite, old.good_steps + 1, 0)
    grow = good >= GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grow, old.scale * 2, old.scale), jnp.maximum(old.scale / 2, 1))
    return LossScale(scale, jnp.where(grow, 0, good))


def next_track(old: LossTrack, loss: Float[Array, ""], finite: Bool[Array, ""]) -> LossTrack:
    """The track after a step.

    A loss above the limit enters the mean as the limit. So a single spike changes the mean little, but a loss that
    stays high raises the mean and the limit in time. A step that was not finite does not count.
    """
    loss = jnp.minimum(loss.astype(jnp.float32), old.limit())
    # The first steps have equal weights (1/1, 1/2, ...), so that the mean does not begin at 0.
    share = jnp.maximum(1 / (old.steps + 1), 1 - SPIKE_DECAY).astype(jnp.float32)
    difference = loss - old.mean
    mean = old.mean + share * difference
    variance = (1 - share) * (old.variance + share * difference**2)
    new = LossTrack(mean, variance, old.steps + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
