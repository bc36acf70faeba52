"""The settings of a run that fit a GPU: the search behind `python -m moe_jax plan`.

It compiles the programs that a run executes: the training step with its state, the evaluation step, prefill and cached
decoding. The precision is the one that a run would choose for the card.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import OptimizerKind, ParamDtype, RunConfig, TrainConfig
from moe_jax.data.batches import evaluation_windows
from moe_jax.inference.sampling import Sampling
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.transformer import Params
from moe_jax.planning import roofline
from moe_jax.planning.device_memory import Bound, bound
from moe_jax.planning.target import Target
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import working
from moe_jax.training.evaluate import EVALUATION_ROWS
from moe_jax.training.programs import Programs
from moe_jax.training.state import initial_params

OPTIMIZERS_BY_STATE: tuple[OptimizerKind, ...] = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
"""Optimizers in descending order of state. A plan starts with the preset's optimizer and goes on to the right until one
fits."""


class Row(NamedTuple):
    """One setting, and the memory and the predicted time of its training step."""

    config: RunConfig
    precision: str
    state_bytes: float
    """Bytes of optimizer state for each parameter."""
    weight_bytes: float
    """Bytes of weights for each parameter."""
    step: Bound
    fits: bool
    attention: str
    """The form of attention in training, and the reason for it."""
    between: dict[str, float] | None = None
    """MiB of each program that runs between its training steps (`plan_inference`). None if they are not compiled."""

    @property
    def tokens(self) -> int:
        """Tokens of a training step."""
        return self.config.tokens_per_step


def candidates(config: RunConfig, every_optimizer: bool) -> Iterator[RunConfig]:
    """Settings with the same batch for each step, from the fastest to the one with the least memory.

    Remat is tried before a leaner optimizer, because it costs time but no quality. With adapters the optimizer's state
    is small, and frozen weights in bfloat16 are tried instead. Accumulation comes last. It holds a second copy of all
    gradients, so it helps only if the activations are larger than that.
    """
    variants = _leaner_weights(config.train) if config.train.lora_rank else _optimizers(config.train, every_optimizer)
    for train in variants:
        for remat in (True,) if config.execution.remat else (False, True):
            yield _changed(config, train, remat)
    whole = config.train.batch_size * config.train.grad_accum
    last = (
        variants[-1] if config.train.lora_rank else dataclasses.replace(config.train, optimizer=OPTIMIZERS_BY_STATE[-1])
    )
    micro = whole
    while micro % 2 == 0:
        micro //= 2
        yield _changed(config, dataclasses.replace(last, batch_size=micro, grad_accum=whole // micro), remat=True)


def _optimizers(train: TrainConfig, every_optimizer: bool) -> list[TrainConfig]:
    """The whole batch at once, with the optimizer of the settings, then with leaner ones, or with every other one."""
    kinds = OPTIMIZERS_BY_STATE
    if train.optimizer in kinds and not every_optimizer:
        kinds = kinds[kinds.index(train.optimizer) :]
    order = (train.optimizer, *(kind for kind in kinds if kind != train.optimizer))
    return [dataclasses.replace(_at_once(train), optimizer=kind) for kind in order]


def _leaner_weights(train: TrainConfig) -> list[TrainConfig]:
    """The whole batch at once, with the frozen weights in the dtype of the settings, then in bfloat16."""
    dtypes: tuple[ParamDtype, ...] = (
        (train.param_dtype, "bfloat16") if train.param_dtype == "float32" else ("bfloat16",)
    )
    return [dataclasses.replace(_at_once(train), param_dtype=dtype) for dtype in dtypes]


def _at_once(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, batch_size=train.batch_size * train.grad_accum, grad_accum=1)


def _changed(config: RunConfig, train: TrainConfig, remat: bool) -> RunConfig:
    return dataclasses.replace(config, train=train, execution=dataclasses.replace(config.execution, remat=remat))


def plan_step(config: RunConfig, target: Target) -> Row:
    """Compile the training step of a configuration for the target."""
    programs = Programs.of(config, target)
    batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    step = bound(target, programs.step, programs.state_shapes, batch)
    return Row(
        config,
        programs.policy.compute,
        _size(programs.state_shapes.optimizer) * MIB / totals(count_parameters(config.model)).total,
        _size(programs.param_shapes) * MIB / totals(count_parameters(config.model)).total,
        step,
        step.fits(target),
        programs.attention.reason,
    )


def search(config: RunConfig, target: Target, every_optimizer: bool = False) -> Iterator[Row]:
    """Compile the candidates in order, to the first whose step fits, and whose programs between the steps fit too. With
    `every_optimizer` compile the steps of all candidates without accumulation."""
    tried = list(candidates(config, every_optimizer))
    if every_optimizer:
        tried = [candidate for candidate in tried if candidate.train.grad_accum == 1]
    for number, candidate in enumerate(tried, 1):
        most = "" if every_optimizer else "at most "
        with working(f"compiling the training step, {_named(candidate)}: setting {number} of {most}{len(tried)}"):
            row = plan_step(candidate, target)
        if row.fits and not every_optimizer:
            row = row._replace(between=plan_inference(candidate, target))
        yield row
        if row.between is not None and max(row.between.values()) <= target.budget:
            return


def _named(config: RunConfig) -> str:
    train = config.train
    accumulated = f", {train.batch_size} x {train.grad_accum} sequences" if train.grad_accum > 1 else ""
    return f"{train.optimizer}{' with remat' * config.execution.remat}{accumulated}"


class Verdict(NamedTuple):
    """The result of a search."""

    row: Row
    """The first setting whose training step and whose programs between the steps fit. Else the first whose step fits,
    else the setting whose step takes the least memory."""
    between: dict[str, float]
    """MiB of each program that runs between its training steps."""
    total: float
    """MiB of the largest program."""
    fits: bool

    def summary(self, target: Target) -> dict[str, Any]:
        """The verdict for JSON output."""
        train = self.row.config.train
        return {
            "preset": self.row.config.preset,
            "gpu": target.name,
            "precision": self.row.precision,
            "total_mib": round(self.total, 1),
            "budget_mib": round(target.budget, 1),
            "fits": self.fits,
            "micro_batch": train.batch_size,
            "grad_accum": train.grad_accum,
            "remat": self.row.config.execution.remat,
            "optimizer": train.optimizer,
            "lora_rank": train.lora_rank,
            "param_dtype": train.param_dtype,
            "compute_dtype": self.row.precision,
            **roofline.summary(self.row.step.prediction, self.row.tokens),
        }


def verdict(rows: list[Row], target: Target) -> Verdict:
    """The setting to use. The programs that run between its training steps are compiled, unless the search has."""
    first, *others = [row for row in rows if row.fits] or [min(rows, key=lambda row: row.step.total)]
    found = _whole(first, target)
    if found.fits:
        return found
    return next((other for other in (_whole(row, target) for row in others) if other.fits), found)


def _whole(row: Row, target: Target) -> Verdict:
    """A setting with all of its programs."""
    between = plan_inference(row.config, target) if row.between is None else row.between
    total = max(row.step.total, *between.values())
    return Verdict(row, between, total, row.fits and total <= target.budget)


def plan_inference(config: RunConfig, target: Target) -> dict[str, float]:
    """MiB of each program that runs between training steps, including what stays in memory: the optimizer state and,
    while it works on the merged weights, the weights with their adapters."""
    programs = Programs.of(config, target)
    params, seq_len = programs.param_shapes, config.model.seq_len
    state_shapes = programs.state_shapes
    waiting = _size(state_shapes.optimizer)
    if state_shapes.adapters is not None:
        waiting += _size(state_shapes.params) + _size(state_shapes.adapters)
    e = next(evaluation_windows(np.zeros(2, np.int32), seq_len=seq_len, batch_size=EVALUATION_ROWS))
    decoder = programs.decoder()
    prompt = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    length = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(decoder.prefill, params, prompt, length)
    settings, key = jax.eval_shape(lambda: (Sampling(), jax.random.key(0)))
    jobs: dict[str, tuple[Any, ...]] = {
        "evaluation": (programs.evaluation, params, e.inputs, e.targets, e.start, e.weights),
        "prefill": (decoder.prefill, params, prompt, length),
        "decoding": (decoder.write, params, state, settings, key, length, length, length),
    }
    found: dict[str, float] = {}
    for number, (name, job) in enumerate(jobs.items(), 1):
        with working(f"compiling {name}, {number} of {len(jobs)} programs that run between the steps"):
            found[name] = bound(target, *job).total + waiting
    return found


def with_adapters(config: RunConfig, rank: int) -> RunConfig:
    """The settings of a fine-tuning by adapters of this model: AdamW for the adapters, on conversations."""
    train = dataclasses.replace(config.train, lora_rank=rank, optimizer="adamw", muon_router=False)
    return dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, format="chat"))


def measured_peak(config: RunConfig) -> float:
    """Peak memory of the first device in MiB, until the end of the second training step."""
    device = jax.devices()[0]
    programs = Programs.of(config, device)
    state = programs.state(initial_params(config, jax.random.key(config.train.seed)))
    shapes = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    tokens = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for _ in range(2):
        state, _ = programs.step(state, tokens)
    jax.block_until_ready(state)
    return device.memory_stats()["peak_bytes_in_use"] / MIB


def _size(tree: Params) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / MIB
