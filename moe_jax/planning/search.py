"""The settings of a run that fit a GPU: the search behind `moe-jax plan`.

It compiles the programs that a run executes: the training step with its state, the evaluation step, prefill and cached
decoding. The precision is the one that a run would choose for the card.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MeshShape, OptimizerKind, ParamDtype, RunConfig, TrainConfig
from moe_jax.data.batches import evaluation_windows
from moe_jax.inference.sampling import Sampling
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.transformer import Params
from moe_jax.parallel.layout import mesh_of
from moe_jax.planning.device_memory import Bound, Memory, bound, gpu_devices, lower_for, measured
from moe_jax.planning.target import CARDS_PER_HOST, Target
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import working
from moe_jax.training.evaluate import EVALUATION_ROWS
from moe_jax.training.programs import Programs

OPTIMIZERS_BY_STATE: tuple[OptimizerKind, ...] = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
"""Optimizers in descending order of state. A plan starts with the preset's optimizer and goes on to the right until one
fits."""


class Plan(NamedTuple):
    """One setting, and the memory of its programs."""

    config: RunConfig
    precision: str
    state_bytes: float
    """Bytes of optimizer state for each parameter."""
    weight_bytes: float
    """Bytes of weights for each parameter."""
    step: Bound
    step_fits: bool
    attention: str
    """The form of attention in training, and the reason for it."""
    between: dict[str, float] | None = None
    """MiB of each program that runs between its training steps (`plan_inference`). None if they are not compiled."""

    @property
    def total(self) -> float:
        """MiB of the largest program."""
        return max(self.step.total, *(self.between or {"": 0.0}).values())

    def fits(self, target: Target) -> bool:
        return self.step_fits and self.between is not None and self.total <= target.budget

    def summary(self, target: Target) -> dict[str, Any]:
        """For JSON output."""
        train = self.config.train
        kept = ("grad_accum", "optimizer", "lora_rank", "param_dtype")
        return {
            "preset": self.config.preset,
            "gpu": target.name,
            "precision": self.precision,
            "compute_dtype": self.precision,
            "total_mib": round(self.total, 1),
            "budget_mib": round(target.budget, 1),
            "fits": self.fits(target),
            "micro_batch": train.batch_size,
            "remat": self.config.execution.remat,
            **{name: getattr(train, name) for name in kept},
        }


def candidates(config: RunConfig) -> Iterator[RunConfig]:
    """Settings with the same batch for each step, from the fastest to the one with the least memory.

    Remat is tried before a leaner optimizer, because it costs time but no quality. With adapters the optimizer's state
    is small, and frozen weights in bfloat16 are tried instead. Accumulation comes last. It holds a second copy of all
    gradients, so it helps only if the activations are larger than that.
    """
    whole = config.train.batch_size * config.train.grad_accum
    variants = leaner(dataclasses.replace(config.train, batch_size=whole, grad_accum=1))
    for train in variants:
        for remat in (True,) if config.execution.remat else (False, True):
            yield _changed(config, train, remat)
    micro = whole
    while micro % 2 == 0:
        micro //= 2
        train = dataclasses.replace(variants[-1], batch_size=micro, grad_accum=whole // micro)
        yield _changed(config, train, remat=True)


def leaner(train: TrainConfig) -> list[TrainConfig]:
    """The training, and the same with ever less memory for weights and optimizer state."""
    if train.lora_rank:
        dtypes: tuple[ParamDtype, ...] = ("float32", "bfloat16") if train.param_dtype == "float32" else ("bfloat16",)
        return [dataclasses.replace(train, param_dtype=dtype) for dtype in dtypes]
    known = train.optimizer in OPTIMIZERS_BY_STATE
    kinds = OPTIMIZERS_BY_STATE[OPTIMIZERS_BY_STATE.index(train.optimizer) :] if known else OPTIMIZERS_BY_STATE
    return [dataclasses.replace(train, optimizer=kind) for kind in dict.fromkeys((train.optimizer, *kinds))]


def _changed(config: RunConfig, train: TrainConfig, remat: bool) -> RunConfig:
    return dataclasses.replace(config, train=train, execution=dataclasses.replace(config.execution, remat=remat))


def plan_step(config: RunConfig, target: Target) -> Plan:
    """Compile the training step of a configuration for the target."""
    programs = Programs.of(config, target)
    batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    step = bound(target, programs.step, programs.state_shapes, batch)
    parameters = totals(count_parameters(config.model)).total
    return Plan(
        config,
        programs.policy.compute,
        _mib(programs.state_shapes.optimizer) * MIB / parameters,
        _mib(programs.param_shapes) * MIB / parameters,
        step,
        step.fits(target),
        programs.attention.reason,
    )


def search(config: RunConfig, target: Target) -> Iterator[Plan]:
    """Compile the candidates in order, to the first whose step fits, and whose programs between the steps fit too."""
    tried = list(candidates(config))
    for number, candidate in enumerate(tried, 1):
        with working(f"compiling the training step, {_named(candidate)}: setting {number} of at most {len(tried)}"):
            plan = plan_step(candidate, target)
        if plan.step_fits:
            plan = plan._replace(between=plan_inference(candidate, target))
        yield plan
        if plan.fits(target):
            return


def _named(config: RunConfig) -> str:
    train = config.train
    accumulated = f", {train.batch_size} x {train.grad_accum} sequences" if train.grad_accum > 1 else ""
    return f"{train.optimizer}{' with remat' * config.execution.remat}{accumulated}"


def verdict(plans: Sequence[Plan], target: Target) -> Plan:
    """The setting to use: the first that fits. Else the first whose step fits, else the one whose step is smallest."""
    fitting = [plan for plan in plans if plan.fits(target)] or [plan for plan in plans if plan.step_fits]
    chosen = fitting[0] if fitting else min(plans, key=lambda plan: plan.step.total)
    between = plan_inference(chosen.config, target) if chosen.between is None else chosen.between
    return chosen._replace(between=between)


def plan_inference(config: RunConfig, target: Target) -> dict[str, float]:
    """MiB of each program that runs between training steps, including what stays in memory: the optimizer state and,
    while it works on the merged weights, the weights with their adapters."""
    programs = Programs.of(config, target)
    params, seq_len = programs.param_shapes, config.model.seq_len
    state_shapes = programs.state_shapes
    waiting = _mib(state_shapes.optimizer)
    if state_shapes.adapters is not None:
        waiting += _mib(state_shapes.params) + _mib(state_shapes.adapters)
    e = next(evaluation_windows(np.zeros(2, np.int32), seq_len=seq_len, batch_size=EVALUATION_ROWS))
    decoder = programs.decoder()
    prompt = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    length = jax.ShapeDtypeStruct((), jnp.int32)
    read = jax.eval_shape(decoder.prefill, params, prompt, length)
    seen, key = jax.eval_shape(lambda: (np.zeros(config.model.vocab_size, bool), jax.random.key(0)))
    text = jax.eval_shape(decoder.begin, read, seen, Sampling().in_own_types(), key, False)
    jobs: dict[str, tuple[Any, ...]] = {
        "evaluation": (programs.evaluation, params, e.inputs, e.targets, e.start, e.weights),
        "prefill": (decoder.prefill, params, prompt, length),
        "decoding": (decoder.write, params, text, length, length),
    }
    memory: dict[str, float] = {}
    for number, (name, job) in enumerate(jobs.items(), 1):
        with working(f"compiling {name}, {number} of {len(jobs)} programs that run between the steps"):
            memory[name] = bound(target, *job).total + waiting
    return memory


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
