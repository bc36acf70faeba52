"""The training step: (state, batch) -> (state, metrics), one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import TrainConfig
from moe_jax.model.balance import adjusted_bias
from moe_jax.model.transformer import Params, merge
from moe_jax.training.loss import Metrics, training_loss
from moe_jax.training.state import LossScale, TrainState, next_scale

DROPOUT = 1
"""Purpose of a random key: every key is fold_in(fold_in(seed, purpose), step)."""


class StepReport(NamedTuple):
    """Read on the host one step late, so that the device never waits for it."""

    metrics: Metrics
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    finite: Array
    """False where the step was skipped."""


type Step = Callable[[TrainState, ArrayLike], tuple[TrainState, StepReport]]


def gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Int[Array, "M B T_plus_1"],
    key: Key[Array, ""],
    scale: Float[Array, ""],
    config: TrainConfig,
    trace: bool = False,
) -> tuple[Params, Metrics]:
    """The mean gradient over M micro-batches of B sequences, and the mean metrics; traces are stacked, M first.

    Every group that a loss is averaged over is one sequence, so accumulated equals whole, auxiliary losses
    included. Micro-batches are summed in order by a scan: one copy of the gradients beside the running sum.
    """

    def micro(tokens: Array, index: Array) -> tuple[Params, Metrics]:
        def scaled_loss(p: Params) -> tuple[Array, Metrics]:
            loss, metrics = training_loss(merge(graphdef, p), tokens, jax.random.fold_in(key, index), config, trace)
            return loss * scale.astype(loss.dtype), metrics

        return jax.grad(scaled_loss, has_aux=True)(params)

    count = batch.shape[0]
    if count == 1:
        grads, metrics = micro(batch[0], jnp.int32(0))
        traces = jax.tree.map(lambda x: x[None], metrics.trace)
        metrics = metrics._replace(trace=None)
    else:

        def add(total: tuple[Params, Metrics], x: tuple[Array, Array]) -> tuple[tuple[Params, Metrics], Any]:
            grads, metrics = micro(*x)
            return jax.tree.map(jnp.add, total, (grads, metrics._replace(trace=None))), metrics.trace

        shapes, of_metrics = jax.eval_shape(micro, batch[0], jnp.int32(0))
        shapes = (shapes, of_metrics._replace(trace=None))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), traces = jax.lax.scan(add, zero, (batch, jnp.arange(count)))
    grads = jax.tree.map(lambda g: g / (count * scale.astype(g.dtype)), grads)
    return grads, jax.tree.map(lambda m: m / count, metrics)._replace(trace=traces)


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
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    loss_scaling: bool,
    trace: bool = False,
) -> Step:
    """The jitted step, which takes over its state's memory. A batch is int32 `[M, B, T+1]`, M micro-batches.

    A step whose gradient is not finite leaves parameters and optimizer as they are and is counted. With float16 it
    also halves the loss scale. With `trace` the metrics hold every decision of the routers; it is static, and the
    program without it does not change by its being there.
    """

    def step(state: TrainState, batch: Array) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROPOUT), state.step)
        scale: LossScale = state.loss_scale
        grads, metrics = gradients(graphdef, state.params, batch, key, scale.scale, config, trace)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm)

        def update() -> tuple[Any, optax.OptState]:
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            return with_adjusted_biases(params, metrics.load, config.balance_rate), optimizer_state

        params, optimizer_state = jax.lax.cond(finite, update, lambda: (state.params, state.optimizer))
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            loss_scale=next_scale(scale, finite) if loss_scaling else scale,
            skipped=state.skipped + ~finite,
        )
        return new, StepReport(metrics, norm, finite)

    return jax.jit(step, donate_argnums=0)
