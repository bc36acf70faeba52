"""The gradient of a training step: the mean over a batch, on one device or on a mesh.

On a mesh each device has b = B / devices sequences of each micro-batch. It computes the loss and the gradient of its
own sequences, as one device would. The gradients are summed once a step, in at least float32, whatever the number of
micro-batches. Sequence i of the whole batch draws its dropout with the same key on every mesh. At the start of a step
each device gathers the matrices that are sharded over fsdp. So during the gradient it holds whole matrices, but only
its own experts. Parameters and the optimizer's state stay sharded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import TrainConfig
from moe_jax.data.batches import MaskedBatch
from moe_jax.model.low_rank import adapted
from moe_jax.model.precision import at_least_float32
from moe_jax.model.transformer import Params, merge
from moe_jax.parallel.layout import AXES, Layout, gathered
from moe_jax.system.random_keys import sequence_keys
from moe_jax.training.loss import Metrics, training_loss

REPLICATED = PartitionSpec()


def gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Int[Array, "M B T_plus_1"] | MaskedBatch,
    key: Key[Array, ""],
    scale: Float[Array, ""] | None,
    config: TrainConfig,
    frozen: Params | None = None,
    layout: Layout | None = None,
    blocks: Int[Array, " M"] | None = None,
) -> tuple[Params, Metrics]:
    """The mean gradient over M micro-batches of B sequences, in at least float32, and the mean metrics.

    Every loss, also the auxiliary ones, is a mean over sequences, and sequence i of the whole batch draws its dropout
    with the key fold_in(key, i). So the accumulated gradient equals the gradient of the whole batch. A scan sums the
    micro-batches in order, and holds the gradients of one micro-batch beside the running sum.

    With `frozen`, the parameters of the model, `params` are its adapters, and the gradient is theirs.

    With a `layout` the devices of its mesh compute it together: the gradient is laid out as `layout.updates`, and every
    device has the metrics. `blocks` are the places of the micro-batches in the whole batch, in units of B sequences: 0
    to M - 1 unless given, as a device of a mesh does.
    """
    if layout is not None:
        return _gradients_on_mesh(layout, graphdef, params, batch, key, scale, config, frozen)

    def micro(tokens: Any, index: Array) -> tuple[Params, Metrics]:
        rows = len(jax.tree.leaves(tokens)[0])
        keys = sequence_keys(key, rows, first=index * rows)

        def scaled_loss(p: Params) -> tuple[Array, Metrics]:
            model = merge(graphdef, p if frozen is None else adapted(frozen, p))
            value, metrics = training_loss(model, tokens, keys, config, loss_scale=scale)
            return value if scale is None else value * scale.astype(value.dtype), metrics

        return jax.grad(scaled_loss, has_aux=True)(params)

    count = len(jax.tree.leaves(batch)[0])
    grads, metrics = _sums(micro, batch, jnp.arange(count, dtype=jnp.int32) if blocks is None else blocks)
    divisor = count if scale is None else count * scale
    grads = jax.tree.map(lambda g: widened(g) / divisor, grads)
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


def widened(x: Array) -> Array:
    """x in at least float32."""
    return x.astype(at_least_float32(x.dtype))


def _gradients_on_mesh(
    layout: Layout,
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Any,
    key: Array,
    scale: Array | None,
    config: TrainConfig,
    frozen: Params | None,
) -> tuple[Params, Metrics]:
    """`gradients` on each device, for its own sequences, and their mean over the devices."""

    def on_device(
        params: Params, frozen: Params | None, batch: Any, key: Array, scale: Array | None
    ) -> tuple[Params, Metrics]:
        if isinstance(batch, MaskedBatch):
            # The weights of all devices sum to 1, and here the mean over the devices is taken.
            batch = batch._replace(weights=batch.weights * layout.devices)
        micro_batches = len(jax.tree.leaves(batch)[0])
        blocks = jnp.arange(micro_batches) * layout.devices + jax.lax.axis_index(AXES)
        whole, own = gathered(frozen), gathered(params)
        grads, metrics = gradients(graphdef, own, batch, key, scale, config, frozen=whole, blocks=blocks)
        mean: Metrics = jax.lax.pmean(metrics, AXES)
        if mean.answers is not None:
            mean = mean._replace(answers=mean.answers * layout.devices)
        return layout.mean_gradients(grads), mean

    places = [layout.tree(tree, layout.params) for tree in (params, frozen)]
    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(*places, layout.batch, REPLICATED, REPLICATED),
        out_specs=(layout.tree(params, layout.updates), REPLICATED),
        check_vma=False,  # every device computes its own loss; what is summed, and where, is written above
    )(params, frozen, batch, key, scale)
