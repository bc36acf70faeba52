"""The ladder: the settings with which a run may fit a device, from the fastest on. `plan` and `train.py` walk it.

Every rung takes the steps that were asked for: as many sequences each, and the same gradient up to rounding. The upper
of two rungs computes less: it has the larger micro-batch or, of the same, no remat. A leaner optimizer trains
differently. Those rungs stand below all others, and are there only with `--fit any`.

`walk` compiles the programs that a run executes, and compares XLA's plan of their buffers with the memory of the device
(`Room`). It ends at the first rung whose programs all fit. A rung that needs more whatever the compiler does
(`least_step_bytes`) is passed over without compiling it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MeshShape, OptimizerKind, ParamDtype, RunConfig, TrainConfig
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.data.batches import evaluation_windows
from moe_jax.inference.decode import NOTHING_GIVEN
from moe_jax.inference.sampling import Sampling
from moe_jax.model.costs import count_parameters, least_step_bytes, totals
from moe_jax.model.precision import choose_policy
from moe_jax.model.transformer import Params
from moe_jax.parallel.layout import mesh_of
from moe_jax.planning.device_memory import Memory, bound, gpu_devices, lower_for, measured
from moe_jax.planning.plans import Plan, named
from moe_jax.planning.target import CARDS_PER_HOST, Target
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import working
from moe_jax.training.evaluate import evaluation_rows
from moe_jax.training.programs import Programs

OPTIMIZERS_BY_STATE: tuple[OptimizerKind, ...] = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
"""Optimizers in descending order of state."""


# The rungs


def rungs(config: RunConfig) -> list[RunConfig]:
    """The settings that may be tried, from the fastest on. Each has the sequences a step of `config`."""
    micro = config.train.batch_size * config.train.grad_accum
    sizes = [micro]
    while micro > 1:
        micro = next(size for size in range(micro // 2, 0, -1) if sizes[0] % size == 0)
        sizes.append(micro)
    remats = (True,) if config.execution.remat else (False, True)
    trains = leaner(config.train) if config.execution.fit == "any" else [config.train]
    return [
        dataclasses.replace(
            config,
            train=dataclasses.replace(train, batch_size=size, grad_accum=sizes[0] // size),
            execution=dataclasses.replace(config.execution, remat=remat),
        )
        for train in trains
        for size in sizes
        for remat in remats
    ]


def leaner(train: TrainConfig) -> list[TrainConfig]:
    """The training, and the same with ever less memory for weights and optimizer state. With adapters, whose state is
    small, the frozen weights in bfloat16."""
    if train.lora_rank:
        dtypes: tuple[ParamDtype, ...] = ("float32", "bfloat16") if train.param_dtype == "float32" else ("bfloat16",)
        return [dataclasses.replace(train, param_dtype=dtype) for dtype in dtypes]
    known = train.optimizer in OPTIMIZERS_BY_STATE
    kinds = OPTIMIZERS_BY_STATE[OPTIMIZERS_BY_STATE.index(train.optimizer) :] if known else OPTIMIZERS_BY_STATE
    return [dataclasses.replace(train, optimizer=kind) for kind in dict.fromkeys((train.optimizer, *kinds))]


def below(config: RunConfig, failed: RunConfig) -> list[RunConfig]:
    """The rungs of `config` below the setting `failed`."""
    kinds = [_optimizer(c) for c in rungs(config)]

    def depth(c: RunConfig) -> tuple[int, int, bool]:
        return kinds.index(_optimizer(c)), -c.train.batch_size, c.execution.remat

    return [rung for rung in rungs(config) if depth(rung) > depth(failed)]


def _optimizer(config: RunConfig) -> tuple[str, str]:
    return config.train.optimizer, config.train.param_dtype


# A device, and the programs on it


class Room(NamedTuple):
    """A device that the programs of a run must fit."""

    device: Any
    """A `jax.Device` of this machine, or the description of a GPU (`Target`)."""
    budget: float
    """MiB for a program, with what is in memory beside it."""
    measure: Callable[..., float]
    """(jitted program, *arguments or their shapes) -> MiB of the program, compiled for the device."""
    kept_precision: str = ""
    """The precision of a resumed run (`choose_policy`)."""

    @classmethod
    def on(cls, target: Target, budget: float | None = None) -> "Room":
        """On a described GPU."""
        most = target.budget if budget is None else budget
        return cls(target, most, lambda *program: bound(target, *program, most=most))


def walk(config: RunConfig, room: Room, failed: RunConfig | None = None) -> Iterator[Plan]:
    """The plans of the rungs in order, to the first that fits. With `failed`, of the rungs below that setting."""
    tried = rungs(config) if failed is None else below(config, failed)
    between: dict[tuple[str, str], dict[str, float]] = {}
    estimate = ", a minute or more"
    for number, rung in enumerate(tried, 1):
        known = between.get(_optimizer(rung), {})
        if max(known.values(), default=0.0) > room.budget:
            continue  # what runs between the steps depends on the optimizer only, and does not fit
        begin = time.monotonic()
        plan = plan_step(rung, room, f": setting {number} of at most {len(tried)}{estimate}")
        if (seconds := time.monotonic() - begin) > 1:  # compiled, and not looked up
            estimate = f", about {seconds:,.0f} s as the last one"
        if plan.programs and plan.total <= room.budget:
            known = between[_optimizer(rung)] = known or plan_between(rung, room)
            plan = plan._replace(programs=plan.programs | known)
        yield plan
        if plan.fits(room.budget):
            return


def plan_step(config: RunConfig, room: Room, which: str = "") -> Plan:
    """Compile the training step of a configuration for the device, unless it cannot fit."""
    precision = choose_policy(config.execution.compute_dtype, room.device, room.kept_precision).compute
    computed = dataclasses.replace(config, execution=dataclasses.replace(config.execution, compute_dtype=precision))
    least = least_step_bytes(computed) / MIB
    if least > room.budget:
        return Plan(config, precision, least, {})
    with working(f"compiling the training step, {named(config)}{which}"):
        programs = Programs.of(config, room.device, kept_precision=room.kept_precision)
        batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
        memory = room.measure(programs.step, programs.state_shapes, batch)
    return Plan(config, precision, least, {"step": memory}, programs.attention.reason)


def plan_between(config: RunConfig, room: Room) -> dict[str, float]:
    """MiB of the programs that run between training steps, including what stays in memory: the optimizer state and,
    while it works on the merged weights, the weights with their adapters.

    Prefill is not among them: it computes one row of what evaluation computes for several.
    """
    programs = Programs.of(config, room.device, kept_precision=room.kept_precision)
    params, seq_len = programs.param_shapes, config.model.seq_len
    state_shapes = programs.state_shapes
    waiting = _mib(state_shapes.optimizer)
    if state_shapes.adapters is not None:
        waiting += _mib(state_shapes.params) + _mib(state_shapes.adapters)
    e = next(evaluation_windows(np.zeros(2, np.int32), seq_len=seq_len, batch_size=evaluation_rows(seq_len)))
    decoder = programs.decoder()
    length = jax.ShapeDtypeStruct((), jnp.int32)
    seen, key = jax.eval_shape(lambda: (np.zeros(config.model.vocab_size, bool), jax.random.key(0)))
    text = jax.eval_shape(decoder.begin_empty, params, seen, Sampling().in_own_types(), key)
    jobs: dict[str, tuple[Any, ...]] = {
        "evaluation": (programs.evaluation, params, e.inputs, e.targets, e.start, e.weights),
        "decoding": (decoder.write, params, text, NOTHING_GIVEN, length, length),
    }
    memory: dict[str, float] = {}
    for number, (name, job) in enumerate(jobs.items(), 1):
        with working(f"compiling {name}, {number} of {len(jobs)} programs between the steps, faster than a step"):
            memory[name] = room.measure(*job) + waiting
    return memory


def fitting_preset(config: RunConfig, room: Room) -> str:
    """The name of the largest preset with fewer parameters than the model of `config` that fits. Empty if none does."""

    def size(c: RunConfig) -> int:
        return totals(count_parameters(with_vocabulary(c).model)).total

    smaller = [c for c in map(preset, PRESETS) if size(c) < size(config)]
    for other in sorted(smaller, key=size, reverse=True):
        if any(plan.fits(room.budget) for plan in walk(with_vocabulary(other), room)):
            return other.preset
    return ""


# Several devices, and adapters


def mesh_memory(config: RunConfig, target: Target) -> Memory:
    """The memory of one card in a training step on the mesh of the configuration. The cards need not be there.

    Raises ConfigError for a mesh that does not fit the model, UserError as `gpu_devices` does.
    """
    mesh = config.execution.mesh
    count = MeshShape.parse(mesh).devices
    hosts = -(-count // CARDS_PER_HOST)
    described = gpu_devices(target, f"1x{hosts}x{count // hosts}")
    programs = Programs.of(config, target, mesh=mesh_of(mesh, described))
    batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    if programs.layout is None:  # a mesh of one place
        lowered = lower_for(target, programs.step, programs.state_shapes, batch)
    else:
        lowered = programs.step.lower(programs.state_shapes, batch)  # pyright: ignore[reportFunctionMemberAccess]
    return measured(target, lowered, {}, f"{count} cards, {mesh}")


def with_adapters(config: RunConfig, rank: int) -> RunConfig:
    """The settings of a fine-tuning by adapters of this model: AdamW for the adapters, on conversations."""
    train = dataclasses.replace(config.train, lora_rank=rank, optimizer="adamw", muon_router=False)
    return dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, format="chat"))


def _mib(tree: Params) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / MIB
