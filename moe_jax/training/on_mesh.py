"""The gradient and the evaluation on a mesh: `shard_map` around the functions of one device.

Each device has b = B / devices sequences of each micro-batch. It computes the loss and the gradient of its own
sequences, as one device would. The gradients are summed once a step, in at least float32, whatever the number of
micro-batches. Sequence i of the whole batch draws its dropout with the same key on every mesh (`gradients`).

At the start of a step each device gathers the matrices that are sharded over fsdp. So during the gradient it holds
whole matrices, but only its own experts. Parameters and the optimizer's state stay sharded.

Evaluation, samples and snapshots of the routing use the plain model: for them every device gathers the whole model
(`Programs.weights`), and needs memory for all parameters besides its own parts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array

from moe_jax.config import TrainConfig
from moe_jax.data.batches import MaskedBatch
from moe_jax.inference.traced_pass import ShardMapWrapper
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.parallel.layout import AXES, Layout, gathered
from moe_jax.parallel.processes import place
from moe_jax.training.evaluate import EvaluationStep
from moe_jax.training.loss import Metrics
from moe_jax.training.step import gradients

REPLICATED = PartitionSpec()


def mesh_gradients(
    layout: Layout,
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Any,
    key: Array,
    scale: Array | None,
    config: TrainConfig,
    frozen: Params | None = None,
) -> tuple[Params, Metrics]:
    """`step.gradients` on the mesh: the mean gradient over the whole batch, laid out as `layout.updates`, and the mean
    metrics, which every device has."""

    def on_device(
        params: Params, frozen: Params | None, batch: Any, key: Array, scale: Array | None
    ) -> tuple[Params, Metrics]:
        if isinstance(batch, MaskedBatch):
            # The weights of all devices sum to 1, and here the mean over the devices is taken.
            batch = batch._replace(weights=batch.weights * layout.devices)
        micro_batches = len(jax.tree.leaves(batch)[0])
        blocks = jnp.arange(micro_batches) * layout.devices + jax.lax.axis_index(AXES)
        whole = gathered(frozen)
        grads, metrics = gradients(graphdef, gathered(params), batch, key, scale, config, frozen=whole, blocks=blocks)
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


def make_mesh_forward(
    layout: Layout, graphdef: nnx.GraphDef, params: Params, trace: bool = False
) -> Callable[[Params, Array], tuple[Array, Array, Array]]:
    """The jitted (params, tokens int32 [B, T]) -> (hidden states [B, T, D], drop fractions [L, B], load [L, E]) of a
    training pass without dropout, for `certify`. `graphdef` is the model that is trained on the mesh, one
    with experts. B is a multiple of the number of devices. With `trace`, the places of the pairs in their queues [L, B,
    T, K] instead of the hidden states."""

    def on_device(params: Params, tokens: Array) -> tuple[Array, Array, Array]:
        hidden, stats, _ = merge(graphdef, gathered(params))(tokens, Mode.TRAIN, trace=trace)
        assert stats is not None
        shown = hidden if stats.trace is None else stats.trace.slot
        return shown, stats.drop_fraction, jax.lax.pmean(stats.load, AXES)

    layers = PartitionSpec(None, AXES)
    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=layout.mesh,
            in_specs=(layout.tree(params, layout.params), PartitionSpec(AXES)),
            out_specs=(layers if trace else PartitionSpec(AXES), layers, REPLICATED),
            check_vma=False,
        )
    )


def make_mesh_evaluation(layout: Layout, local: EvaluationStep) -> EvaluationStep:
    """The evaluation step `local` of one device, on the mesh: each device scores some of the rows, with the whole
    model.

    Parameters may lie anywhere. A batch is filled up with rows that do not count, so that every device has as many.
    """
    rows = PartitionSpec(AXES)

    def on_device(params: Params, *batch: Array) -> tuple[Array, Array]:
        return jax.lax.psum(local(params, *batch), AXES)

    step = jax.jit(
        jax.shard_map(
            on_device,
            mesh=layout.mesh,
            in_specs=(REPLICATED, rows, rows, rows, rows),
            out_specs=REPLICATED,
            check_vma=False,
        )
    )

    def evaluation(params: Params, *batch: ArrayLike) -> tuple[Array, Array]:
        arrays = [np.asarray(x) for x in batch]
        missing = -len(arrays[0]) % layout.devices
        filled = [np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) for x in arrays]
        whole = jax.tree.map(lambda x: place(x, layout.sharding(REPLICATED)), params)
        return step(whole, *(place(x, layout.sharding(rows)) for x in filled))

    return evaluation


def same_on_all_devices(layout: Layout) -> ShardMapWrapper:
    """What turns a function into one that all devices of the mesh compute alike. Arguments and results are whole on
    every device."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=layout.mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False)

    return wrap
