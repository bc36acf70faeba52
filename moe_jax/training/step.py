"""The training step: (state, batch) -> (state, metrics), one compiled program.

Chapter 13 of `foundation` derives when the accumulated gradient of micro-batches is the gradient of the whole batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key

from moe_jax.config import TrainConfig
from moe_jax.data.batches import MaskedBatch
from moe_jax.model.moe.router import adjusted_bias
from moe_jax.model.precision import stochastic_round
from moe_jax.model.transformer import Params
from moe_jax.parallel.layout import Layout
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.gradients import gradients, widened
from moe_jax.training.loss import Metrics
from moe_jax.training.optimizers.factory import learning_rate
from moe_jax.training.state import LossScale, TrainState, next_scale


class StepReport(NamedTuple):
    """The report of a step. The host reads it one step late, so that the device does not wait for the host."""

    metrics: Metrics
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    finite: Bool[Array, ""]
    """Whether the loss and the gradient norm were finite. If not, the step was skipped."""
    lr: Float[Array, ""]
    """The learning rate of this step (of AdamW, where Muon trains the matrices)."""


type Batch = ArrayLike | MaskedBatch
"""int32 [M, B, T+1], or with the weight of each target."""
type Step = Callable[[TrainState, Batch], tuple[TrainState, StepReport]]


def global_norm(grads: Params) -> Float[Array, ""]:
    """Root of the sum of all squares. Vectors (norms, biases) are summed as one, so that a GPU needs one launch for all
    of them. A mesh keeps every vector whole on each device, so this moves nothing between devices."""
    leaves = jax.tree.leaves(grads)
    vectors = [g for g in leaves if g.ndim == 1]
    wholes = [g for g in leaves if g.ndim != 1] + ([jnp.concatenate(vectors)] if vectors else [])
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in wholes))


def clip_factor(norm: Float[Array, ""], limit: float) -> Float[Array, ""]:
    """The factor by which gradients of global norm `norm` are multiplied, so that their norm is at most `limit`."""
    return jnp.minimum(1, limit / norm)


def apply_updates(params: Params, updates: Any, key: Key[Array, ""]) -> Params:
    """params + updates, summed in at least float32. The sum is rounded stochastically if the parameter is bfloat16."""
    leaves, tree = jax.tree.flatten(params)
    sums = [widened(p) + u for p, u in zip(leaves, jax.tree.leaves(updates), strict=True)]
    for i, p in enumerate(leaves):
        if p.dtype == jnp.bfloat16:
            sums[i] = stochastic_round(sums[i], jax.random.fold_in(key, i))
    return tree.unflatten(sums)


def with_adjusted_biases(params: Params, load: Float[Array, "L E"], rate: float) -> Params:
    """The parameters after `adjusted_bias` has changed each router's balance bias. Unchanged if routers have none."""
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
    layout: Layout | None = None,
    state_shapes: Any = None,
) -> Step:
    """The jitted step. It reuses the memory of the state that it is given. A batch is int32 `[M, B, T+1]`: M
    micro-batches.

    If the loss or the gradient norm is not finite, the step is counted as skipped, and parameters and optimizer keep
    every bit. With float16 the step also halves the loss scale.

    If the state has adapters, `graphdef` is that of the adapted model. Then only the adapters change.

    With a `layout` the devices of its mesh take the step together, and the state, whose shapes are given, lies on them.
    """
    schedule = learning_rate(config, config.lr)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepReport]:
        key = purpose_key(config.seed, Purpose.DROPOUT, state.step)
        scale: LossScale = state.loss_scale
        factor = scale.scale if loss_scaling else None
        trained = state.trained
        grads, metrics = gradients(graphdef, trained, batch, key, factor, config, frozen=state.frozen, layout=layout)
        norm = global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)
        with jax.named_scope("optimizer"):
            # One factor clips all gradients. It is applied where a gradient is used, so that the compiler needs no
            # clipped copy of all gradients.
            clip = clip_factor(norm, config.max_grad_norm)
            clipped = jax.tree.map(lambda g: g * clip.astype(g.dtype), grads)
            wide = jax.tree.map(widened, trained)
            updates, optimizer_state = optimizer.update(clipped, state.optimizer, wide, taken=finite, step=state.step)
            moved = apply_updates(trained, updates, purpose_key(config.seed, Purpose.ROUND_WEIGHTS, state.step))
            if state.adapters is None:
                moved = with_adjusted_biases(moved, metrics.load, config.router_bias_lr)
            # Selected entry by entry, so that the new parameters reuse the memory of the old ones. With `lax.cond`
            # both would exist at once.
            moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, trained)
        new = TrainState(
            step=state.step + 1,
            params=moved if state.adapters is None else state.params,
            adapters=None if state.adapters is None else moved,
            optimizer=optimizer_state,
            loss_scale=next_scale(scale, finite) if loss_scaling else scale,
            skipped=state.skipped + ~finite,
        )
        return new, StepReport(metrics, norm, finite, jnp.asarray(schedule(state.step)))

    if layout is None:
        return jax.jit(step, donate_argnums=0)
    # Without `out_shardings` the compiler would choose where the new state lies, and the next step would compile anew.
    placed = layout.state(state_shapes)
    in_shardings = placed, layout.sharding(layout.batch)
    return jax.jit(step, donate_argnums=0, in_shardings=in_shardings, out_shardings=(placed, None))
