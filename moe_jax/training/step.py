"""The training step: (state, batch) -> (state, metrics), one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import TrainConfig
from moe_jax.model.balance import adjusted_bias
from moe_jax.model.precision import at_least_float32, round_at_random
from moe_jax.model.transformer import Params, merge
from moe_jax.training.loss import Metrics, training_loss
from moe_jax.training.state import LossScale, TrainState, next_scale, next_track

DROPOUT = 1
"""Purpose of a random key: every key is fold_in(fold_in(seed, purpose), step)."""


ROUND_WEIGHTS = 4
"""Likewise; 3 is `adam8bit.ROUND_MOMENTS`."""


class StepReport(NamedTuple):
    """Read on the host one step late, so that the device never waits for it."""

    metrics: Metrics
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    finite: Bool[Array, ""]
    """Whether loss and gradient were; otherwise the step was skipped."""
    spike: Bool[Array, ""]
    """Whether the loss was far above what it has been lately (`LossTrack.limit`)."""


type Step = Callable[[TrainState, ArrayLike], tuple[TrainState, StepReport]]


def gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Int[Array, "M B T_plus_1"],
    key: Key[Array, ""],
    scale: Float[Array, ""] | None,
    config: TrainConfig,
    trace: bool = False,
) -> tuple[Params, Metrics]:
    """The mean gradient over M micro-batches of B sequences, in at least float32, and the mean metrics; traces are
    stacked, M first.

    Every group that a loss is averaged over is one sequence, so accumulated equals whole, auxiliary losses
    included. Micro-batches are summed in order by a scan: one copy of the gradients beside the running sum.
    """

    def micro(tokens: Array, index: Array) -> tuple[Params, Metrics]:
        def scaled_loss(p: Params) -> tuple[Array, Metrics]:
            loss, metrics = training_loss(merge(graphdef, p), tokens, jax.random.fold_in(key, index), config, trace)
            return loss if scale is None else loss * scale.astype(loss.dtype), metrics

        return jax.grad(scaled_loss, has_aux=True)(params)

    count = batch.shape[0]
    if count == 1:
        grads, metrics = micro(batch[0], jnp.int32(0))
        traces = jax.tree.map(lambda x: x[None], metrics.trace)
        metrics = metrics._replace(trace=None)
    else:

        def accumulate(total: tuple[Params, Metrics], x: tuple[Array, Array]) -> tuple[tuple[Params, Metrics], Any]:
            grads, metrics = micro(*x)
            return jax.tree.map(jnp.add, total, (grads, metrics._replace(trace=None))), metrics.trace

        shapes, of_metrics = jax.eval_shape(micro, batch[0], jnp.int32(0))
        shapes = (shapes, of_metrics._replace(trace=None))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype)), shapes)
        (grads, metrics), traces = jax.lax.scan(accumulate, zero, (batch, jnp.arange(count)))
    divisor = count if scale is None else count * scale
    grads = jax.tree.map(lambda g: _wide(g) / divisor, grads)
    return grads, jax.tree.map(lambda m: m / count, metrics)._replace(trace=traces)


def _wide(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))


def global_norm(grads: Params) -> Float[Array, ""]:
    """Root of the sum of all squares."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))


def clip_factor(norm: Float[Array, ""], limit: float) -> Float[Array, ""]:
    """What gradients of a global norm are multiplied by, so that none is longer than the limit."""
    return jnp.minimum(1, limit / norm)


def purpose_key(seed: int, purpose: int, step: Array) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def add(params: Params, updates: Any, key: Key[Array, ""]) -> Params:
    """params + updates, each sum in at least float32; where the parameter is bfloat16 it is rounded at random."""
    leaves, tree = jax.tree.flatten(params)
    sums = [_wide(p) + u for p, u in zip(leaves, jax.tree.leaves(updates), strict=True)]
    for i, p in enumerate(leaves):
        if p.dtype == jnp.bfloat16:
            sums[i] = round_at_random(sums[i], jax.random.fold_in(key, i))
    return tree.unflatten(sums)


def with_adjusted_biases(params: Params, load: Float[Array, "L E"], rate: float) -> Params:
    """The parameters with each router's balance bias moved against its load, where routers have one."""
    if "balance_bias" not in params["blocks"][0]["ffn"]:
        return params
    blocks = dict(params["blocks"])
    for i, block in blocks.items():
        ffn = block["ffn"]
        blocks[i] = {**block, "ffn": {**ffn, "balance_bias": adjusted_bias(ffn["balance_bias"], load[i], rate)}}
    return {**params, "blocks": blocks}


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    config: TrainConfig,
    loss_scaling: bool,
    trace: bool = False,
) -> Step:
    """The jitted step, which takes over its state's memory. A batch is int32 `[M, B, T+1]`, M micro-batches.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they are and is counted, and so
    does a loss spike where the configuration asks for that. With float16 the former also halves the loss scale.
    With `trace` the metrics hold every decision of the routers; it is static, and the program without it does not
    change by its being there.
    """

    def step(state: TrainState, batch: Array) -> tuple[TrainState, StepReport]:
        key = purpose_key(config.seed, DROPOUT, state.step)
        scale: LossScale = state.loss_scale
        factor = scale.scale if loss_scaling else None
        grads, metrics = gradients(graphdef, state.params, batch, key, factor, config, trace)
        norm = global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)
        spike = finite & (metrics.loss > state.loss_track.limit())
        taken = finite & ~spike if config.skip_spikes else finite
        # One factor, applied where a gradient is used: a clipped copy of all gradients never exists.
        clip = clip_factor(norm, config.clip)
        clipped = jax.tree.map(lambda g: g * clip.astype(g.dtype), grads)
        wide = jax.tree.map(_wide, state.params)
        updates, optimizer_state = optimizer.update(clipped, state.optimizer, wide, taken=taken)
        params = add(state.params, updates, purpose_key(config.seed, ROUND_WEIGHTS, state.step))
        params = with_adjusted_biases(params, metrics.load, config.balance_rate)
        new = TrainState(
            step=state.step + 1,
            # Entry by entry, so that each update takes its parameter's memory; `lax.cond` would hold both.
            params=jax.tree.map(lambda new, old: jnp.where(taken, new, old), params, state.params),
            optimizer=optimizer_state,
            loss_scale=next_scale(scale, finite) if loss_scaling else scale,
            loss_track=next_track(state.loss_track, metrics.loss, finite),
            skipped=state.skipped + ~taken,
        )
        return new, StepReport(metrics, norm, finite, spike)

    return jax.jit(step, donate_argnums=0)
