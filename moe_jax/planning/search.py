"""The settings of a run that fit a GPU: the search behind `python -m moe_jax plan`.

It compiles the programs that a run executes: the training step with its state, the evaluation step, prefill and cached
decoding. The precision is the one that a run would choose for the card.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import OptimizerKind, RunConfig
from moe_jax.data.batches import evaluation_windows
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.transformer import Params
from moe_jax.planning.device_memory import MIB, Bound, Target, bound
from moe_jax.training.evaluate import EVALUATION_ROWS
from moe_jax.training.programs import Programs
from moe_jax.training.state import initial_params

OPTIMIZERS_BY_STATE: tuple[OptimizerKind, ...] = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
"""Optimizers in descending order of state. A plan starts with the preset's optimizer and goes on to the right until one
fits."""


class Row(NamedTuple):
    """One setting, and the memory of its training step."""

    config: RunConfig
    precision: str
    state_bytes: float
    """Bytes of optimizer state for each parameter."""
    weight_bytes: float
    """Bytes of weights for each parameter."""
    step: Bound
    fits: bool


def candidates(config: RunConfig, every_optimizer: bool) -> Iterator[RunConfig]:
    """Settings with the same batch for each step, from the fastest to the one with the least memory.

    Remat is tried before a leaner optimizer, because it costs time but no quality. Accumulation comes last. It holds a
    second copy of all gradients, so it helps only if the activations are larger than that.
    """
    train = config.train
    whole = train.batch_size * train.grad_accum
    leaner = (
        OPTIMIZERS_BY_STATE[OPTIMIZERS_BY_STATE.index(train.optimizer) + 1 :]
        if train.optimizer in OPTIMIZERS_BY_STATE
        else OPTIMIZERS_BY_STATE
    )
    kinds = (train.optimizer, *(k for k in OPTIMIZERS_BY_STATE if k != train.optimizer)) if every_optimizer else None

    def changed(remat: bool, **changes: Any) -> RunConfig:
        execution = dataclasses.replace(config.execution, remat=remat)
        return dataclasses.replace(config, train=dataclasses.replace(train, **changes), execution=execution)

    for kind in kinds or (train.optimizer, *leaner):
        for remat in (True,) if config.execution.remat else (False, True):
            yield changed(remat, optimizer=kind, batch_size=whole, grad_accum=1)
    micro = whole
    while micro % 2 == 0:
        micro //= 2
        yield changed(True, optimizer=OPTIMIZERS_BY_STATE[-1], batch_size=micro, grad_accum=whole // micro)


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
    )


def search(config: RunConfig, target: Target, every_optimizer: bool = False) -> Iterator[Row]:
    """Compile the candidates in order, to the first that fits; with `every_optimizer` all without accumulation."""
    for candidate in candidates(config, every_optimizer):
        if every_optimizer and candidate.train.grad_accum > 1:
            return
        row = plan_step(candidate, target)
        yield row
        if row.fits and not every_optimizer:
            return


class Verdict(NamedTuple):
    """The result of a search."""

    row: Row
    """The first setting whose training step fits, else the setting that takes the least memory."""
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
        }


def verdict(rows: list[Row], target: Target) -> Verdict:
    """The setting to use. The programs that run between its training steps are compiled too."""
    chosen = next((row for row in rows if row.fits), min(rows, key=lambda row: row.step.total))
    between = plan_inference(chosen.config, target)
    total = max(chosen.step.total, *between.values())
    return Verdict(chosen, between, total, chosen.fits and total <= target.budget)


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
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    found = {
        "evaluation": bound(target, programs.evaluation, params, e.inputs, e.targets, e.start, e.weights),
        "prefill": bound(target, decoder.prefill, params, prompt, length),
        "decoding": bound(target, decoder.advance, params, state, token),
    }
    return {name: b.total + waiting for name, b in found.items()}


def with_adapters(config: RunConfig, rank: int) -> RunConfig:
    """The settings of a fine-tuning by adapters of this model: AdamW for the adapters, on conversations."""
    train = dataclasses.replace(config.train, lora_rank=rank, optimizer="adamw", muon_router=False)
    return dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, format="chat"))


def largest_that_fits(configs: Iterable[RunConfig], target: Target) -> Verdict | None:
    """The plan of the largest model of which a setting fits the target. None if none fits. The largest is tried first,
    and nothing smaller is compiled."""
    by_size = sorted(configs, key=lambda c: totals(count_parameters(c.model)).total, reverse=True)
    for config in by_size:
        found = verdict(list(search(config, target)), target)
        if found.fits:
            return found
    return None


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
