"""Everything that a run carries from one step to the next on the device, as one value."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import RunConfig
from moe_jax.model.precision import at_least_float32, stored
from moe_jax.model.transformer import Params, create, split

INITIAL_SCALE = 2.0**15
GROWTH_STEPS = 2000

SPIKE_DECAY = 1 - 1 / 128
SPIKE_AFTER = 128
"""Steps after which the loss is known well enough for one to be called a spike."""
SPIKE_SIGMAS = 6.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): doubled after 2,000 good steps, halved by a bad
    one. 1 and constant unless the compute precision is float16."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossTrack:
    """Where the loss has been lately: a mean and a variance that forget with a half-life of 88 steps."""

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
    """The state of training. Saved whole in a checkpoint; the position in the data is the step."""

    step: Int[Array, ""]
    """Steps taken, skipped ones included."""
    params: Params
    optimizer: Any
    loss_scale: LossScale
    loss_track: LossTrack
    skipped: Int[Array, ""]
    """Steps that changed parameters and optimizer in no bit, because their loss or gradient was not finite, or was
    a spike and spikes are skipped."""


def initial_params(config: RunConfig, key: Key[Array, ""]) -> Params:
    """Random parameters in the dtypes that they are stored in."""

    def make(key: Array) -> Params:
        return stored(split(create(config.model, key))[1], config.train.weights)

    # As one program, narrow parameters are written as such: float32 ones, twice as large, never exist.
    return make(key) if config.train.weights == "float32" else jax.jit(make)(key)


def initial_state(params: Params, optimizer: optax.GradientTransformation, loss_scaling: bool) -> TrainState:
    scale = INITIAL_SCALE if loss_scaling else 1.0
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(jax.tree.map(lambda p: p.astype(at_least_float32(p.dtype)), params)),
        loss_scale=LossScale(jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32)),
        loss_track=LossTrack(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)),
        skipped=jnp.zeros((), jnp.int32),
    )


def next_scale(old: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """The scale after a step whose gradient was finite, or was not."""
    good = jnp.where(finite, old.good_steps + 1, 0)
    grow = good >= GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grow, old.scale * 2, old.scale), jnp.maximum(old.scale / 2, 1))
    return LossScale(scale, jnp.where(grow, 0, good))


def next_track(old: LossTrack, loss: Float[Array, ""], finite: Bool[Array, ""]) -> LossTrack:
    """The track after a step. A spike counts as its limit: it teaches little, but a loss that stays high becomes the
    usual one in time. A step that was not finite counts for nothing."""
    loss = jnp.minimum(loss.astype(jnp.float32), old.limit())
    # The first steps weigh equally (1/1, 1/2, ...), so that the track does not begin at 0.
    share = jnp.maximum(1 / (old.steps + 1), 1 - SPIKE_DECAY).astype(jnp.float32)
    difference = loss - old.mean
    mean = old.mean + share * difference
    variance = (1 - share) * (old.variance + share * difference**2)
    new = LossTrack(mean, variance, old.steps + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
