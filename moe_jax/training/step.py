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
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import TrainConfig
from moe_jax.data.batches import MaskedBatch
from moe_jax.model.low_rank import adapted
from moe_jax.model.moe.balance import adjusted_bias
from moe_jax.model.precision import at_least_float32, stochastic_round
from moe_jax.model.transformer import Params, merge
from moe_jax.system.random_keys import Purpose, purpose_key, sequence_keys
from moe_jax.training.loss import Metrics, training_loss
from moe_jax.training.optimizers.factory import learning_rate
from moe_jax.training.state import LossScale, TrainState, next_scale, next_track

type Gradients = Callable[..., tuple[Params, Metrics]]
"""`gradients`, or what a mesh has in its place."""


class MeshPrograms(NamedTuple):
    """What a step on several devices has in place of a step on one (`training/on_mesh.py`)."""

    gradients: Gradients
    """In place of `gradients`, with the same arguments."""
    state: Any
    """The shardings of a `TrainState`."""
    batch: Any
    """The sharding of a batch."""


class StepReport(NamedTuple):
    """The report of a step. The host reads it one step late, so that the device does not wait for the host."""

    metrics: Metrics
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    finite: Bool[Array, ""]
    """Whether the loss and the gradient norm were finite. If not, the step was skipped."""
    spike: Bool[Array, ""]
    """Whether the loss was far above its recent mean (`LossTrack.limit`)."""
    lr: Float[Array, ""]
    """The learning rate of this step (of AdamW, where Muon trains the matrices)."""


type Batch = ArrayLike | MaskedBatch
"""int32 [M, B, T+1], or with the weight of each target."""
type Step = Callable[[TrainState, Batch], tuple[TrainState, StepReport]]
type Loss = Callable[..., tuple[Array, Metrics]]
"""(model, tokens [B, T+1], keys [B], config, loss_scale=...) -> (the loss to minimise, metrics), as `training_loss`."""


def gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Int[Array, "M B T_plus_1"] | MaskedBatch,
    key: Key[Array, ""],
    scale: Float[Array, ""] | None,
    config: TrainConfig,
    loss: Loss = training_loss,
    frozen: Params | None = None,
    blocks: Int[Array, " M"] | None = None,
) -> tuple[Params, Metrics]:
    """The mean gradient over M micro-batches of B sequences, in at least float32, and the mean metrics.

    Every loss, also the auxiliary ones, is a mean over sequences, and sequence i of the whole batch draws its dropout
    and router noise with the key fold_in(key, i). So the accumulated gradient equals the gradient of the
    whole batch. A scan sums the micro-batches in order, and holds the gradients of one micro-batch beside the running
    sum.

    With `frozen`, the parameters of the model, `params` are its adapters, and the gradient is theirs.

    `blocks` are the places of the micro-batches in the whole batch, in units of B sequences: 0 to M - 1 unless given. A
    device of a mesh, which has some of the sequences only, gives them.
    """

    def micro(tokens: Any, index: Array) -> tuple[Params, Metrics]:
        rows = len(jax.tree.leaves(tokens)[0])
        keys = sequence_keys(key, rows, first=index * rows)

        def scaled_loss(p: Params) -> tuple[Array, Metrics]:
            model = merge(graphdef, p if frozen is None else adapted(frozen, p))
            value, metrics = loss(model, tokens, keys, config, loss_scale=scale)
            return value if scale is None else value * scale.astype(value.dtype), metrics

        return jax.grad(scaled_loss, has_aux=True)(params)

    count = len(jax.tree.leaves(batch)[0])
    grads, metrics = _sums(micro, batch, jnp.arange(count, dtype=jnp.int32) if blocks is None else blocks)
    divisor = count if scale is None else count * scale
    grads = jax.tree.map(lambda g: _wide(g) / divisor, grads)
    return grads, jax.tree.map(lambda m: m / count, metrics)


def _sums(
    micro: Callable[[Any, Array], tuple[Params, Metrics]], batch: Any, blocks: Int[Array, " M"]
) -> tuple[Params, Metrics]:
    """The gradients and the metrics of the micro-batches, summed."""
    first = jax.tree.map(lambda x: x[0], batch)
    if len(blocks) == 1:
        return micro(first, blocks[0])

    def accumulate(total: tuple[Params, Metrics], x: tuple[Any, Array]) -> tuple[tuple[Params, Metrics], None]:
        return jax.tree.map(jnp.add, total, micro(*x)), None

    shapes = jax.eval_shape(micro, first, jnp.int32(0))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype)), shapes)
    return jax.lax.scan(accumulate, zero, (batch, blocks))[0]


def _wide(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))


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
    sums = [_wide(p) + u for p, u in zip(leaves, jax.tree.leaves(updates), strict=True)]
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


def _is_known(metrics: Metrics, finite: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether the loss is a number, and the loss of any token. A window of a long question has no answer in it."""
    return finite if metrics.answers is None else finite & (metrics.answers > 0)


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    config: TrainConfig,
    loss_scaling: bool,
    mesh: MeshPrograms | None = None,
) -> Step:
    """The jitted step. It reuses the memory of the state that it is given. A batch is int32 `[M, B, T+1]`: M
    micro-batches.

    If the loss or the gradient norm is not finite, the step is counted as skipped, and parameters and optimizer keep
    every bit. With float16 the step also halves the loss scale.

    If the state has adapters, `graphdef` is that of the adapted model. Then only the adapters change.

    With a `mesh`, its devices take the step together, and the state lies on them.
    """
    schedule = learning_rate(config, config.lr)
    compute_gradients = gradients if mesh is None else mesh.gradients

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepReport]:
        key = purpose_key(config.seed, Purpose.DROPOUT, state.step)
        scale: LossScale = state.loss_scale
        factor = scale.scale if loss_scaling else None
        trained = state.trained
        grads, metrics = compute_gradients(graphdef, trained, batch, key, factor, config, frozen=state.frozen)
        norm = global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)
        spike = finite & (metrics.loss > state.loss_track.limit())
        with jax.named_scope("optimizer"):
            # One factor clips all gradients. It is applied where a gradient is used, so that the compiler needs no
            # clipped copy of all gradients.
            clip = clip_factor(norm, config.max_grad_norm)
            clipped = jax.tree.map(lambda g: g * clip.astype(g.dtype), grads)
            wide = jax.tree.map(_wide, trained)
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
            loss_track=next_track(state.loss_track, metrics.loss, _is_known(metrics, finite)),
            skipped=state.skipped + ~finite,
        )
        return new, StepReport(metrics, norm, finite, spike, jnp.asarray(schedule(state.step)))

    return jax.jit(step, donate_argnums=0, **_places(mesh))


def _places(mesh: MeshPrograms | None) -> dict[str, Any]:
    """Where the arguments and results of a step lie, for `jax.jit`."""
    if mesh is None:
        return {}
    # Without `out_shardings` the compiler would choose where the new state lies, and the next step would compile anew.
    return {"in_shardings": (mesh.state, mesh.batch), "out_shardings": (mesh.state, None)}
