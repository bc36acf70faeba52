"""The model, the meshes and the programs of the tests on eight devices. Programs are shared: they compile slowly."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moe_jax.certify import Certificate
from moe_jax.certify.causality import perturbed, tight
from moe_jax.config import ExecutionConfig, RunConfig, TrainConfig
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.parallel.experts import device_rows
from moe_jax.parallel.layout import AXES, Layout, gathered, mesh_of
from moe_jax.training.programs import Programs
from tests.support import tiny

DEVICES = 8
MESHES = ("data=8", "expert=8", "data=2,expert=4", "fsdp=2,expert=4", "fsdp=8")
T, B, V = 32, 16, 64


def config(mesh: str = "", optimizer: str = "adamw", **changes: Any) -> RunConfig:
    """A small run whose experts drop choices. `changes` are fields of the model, its routing or the training."""
    train = {"batch_size": B, "steps": 20, "lr": 1e-3, "muon_lr": 3e-3, "warmup_steps": 2, "optimizer": optimizer}
    train |= {
        name: changes.pop(name)
        for name in ("grad_accum", "seed", "param_dtype", "lora_rank", "train_router")
        if name in changes
    }
    execution: dict[str, Any] = {"compute_dtype": "float32"}
    execution |= {name: changes.pop(name) for name in ("remat", "compute_dtype") if name in changes}
    model = {"vocab_size": V, "seq_len": T, "layers": 1, "width": 32, "heads": 4, "experts": 8, "expert_hidden": 32}
    model |= {"dropout": 0.1, "capacity_factor": 0.75} | changes
    return RunConfig(
        model=tiny.config(**model),
        train=TrainConfig(**train),  # pyright: ignore[reportArgumentType]
        execution=ExecutionConfig(mesh=mesh, **execution),
    )


@functools.lru_cache
def programs(mesh: str = "", optimizer: str = "adamw", **changes: Any) -> Programs:
    """The programs on a mesh of all eight devices, or on one device."""
    return Programs.of(config(mesh, optimizer, **changes), mesh=mesh_of(mesh))


def batch(step: int, micro_batches: int = 1, length: int = T) -> np.ndarray:
    return tiny.tokens(micro_batches, B, length + 1, seed=step, vocabulary=V)


def train(programs: Programs, steps: int, first: int = 0, state: Any = None) -> tuple[Any, list[float]]:
    """The state after some steps, and their losses. Starts from the initial parameters unless given a state."""
    state = programs.state(programs.initial_params()) if state is None else state
    losses = []
    for step in range(first, first + steps):
        state, report = programs.step(state, batch(step, programs.config.train.grad_accum))
        losses.append(float(report.metrics.loss))
    return state, losses


def make_mesh_forward(
    layout: Layout, graphdef: nnx.GraphDef, params: Params, trace: bool = False
) -> Callable[[Params, Array], tuple[Array, Array, Array]]:
    """The jitted (params, tokens int32 [B, T]) -> (hidden states [B, T, D], drop fractions [L, B], load [L, E]) of a
    training pass without dropout. `graphdef` is the model that is trained on the mesh, one
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
            out_specs=(layers if trace else PartitionSpec(AXES), layers, PartitionSpec()),
            check_vma=False,
        )
    )


def mesh_causality(config: RunConfig, params: Params) -> Certificate:
    """The causality of the whole model in training mode on the mesh of `config`. Each device has two sequences, so that
    a sequence that is left alone has a neighbour that changes."""
    model, mesh = tight(config.model), mesh_of(config.execution.mesh)
    programs = Programs.of(dataclasses.replace(config, model=model), mesh=mesh)
    layout = programs.layout
    assert layout is not None
    placed = jax.device_put(params, layout.shardings(params, layout.params))
    forward = make_mesh_forward(layout, programs.trained_graphdef, programs.param_shapes)
    n, routing = layout.mesh.shape["expert"], model.routing
    rows = device_rows(T, model.experts, routing.top_k, n, routing.device_capacity_factor)
    slots = rows if model.dropless else model.capacity
    before, other = np.random.default_rng(0).integers(0, V, (2, 2 * DEVICES, T)).astype(np.int32)
    return perturbed("mesh", lambda tokens: forward(placed, tokens)[:2], before, other, 1.0, slots)
