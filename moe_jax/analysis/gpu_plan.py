"""Which settings of a run fit a GPU: the search behind `python -m moe_jax plan`.

What is compiled is what a run executes: the training step with its state, the evaluation step, prefill and cached
decoding, for the precision that the card would be given.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.analysis.accounting import count_parameters, totals
from moe_jax.analysis.gpu_memory import MIB, Bound, Target, bound
from moe_jax.config import OptimizerKind, RunConfig
from moe_jax.data.batches import evaluation_windows
from moe_jax.inference.decode import Decoder
from moe_jax.model.precision import Policy, choose_policy
from moe_jax.model.transformer import Params
from moe_jax.training.evaluate import EVALUATION_ROWS, make_evaluation_step
from moe_jax.training.optimizer import make_optimizer, state_bytes
from moe_jax.training.run import abstract_model
from moe_jax.training.state import TrainState, initial_params, initial_state
from moe_jax.training.step import Step, make_step

LEANER: tuple[OptimizerKind, ...] = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
"""From the most state to the least. A plan goes from the preset's own towards the end until one fits."""


class Programs(NamedTuple):
    """What a run of a configuration executes on a device, and the shapes of what it executes it on."""

    graphdef: nnx.GraphDef
    step: Step
    state: TrainState
    policy: Policy

    @classmethod
    def of(cls, config: RunConfig, device: Any = None) -> "Programs":
        """For a device, or a description of one; the first of this machine unless given."""
        policy = choose_policy(config.train.precision, device)
        graphdef, shapes = abstract_model(config, policy.compute)
        optimizer = make_optimizer(config.train)
        state = jax.eval_shape(lambda p: initial_state(p, optimizer, policy.loss_scaling), shapes)
        return cls(graphdef, make_step(graphdef, optimizer, config.train, policy.loss_scaling), state, policy)


class Row(NamedTuple):
    """One setting, and what its training step takes."""

    config: RunConfig
    precision: str
    state_bytes: float
    """Bytes of optimizer state for each parameter."""
    weight_bytes: float
    step: Bound
    fits: bool


def candidates(config: RunConfig, every_optimizer: bool) -> Iterator[RunConfig]:
    """Settings of the same effective batch, from the cheapest in time to the leanest.

    Remat before a leaner optimizer, for it costs time and no quality. Accumulation comes last: it holds a second
    copy of all gradients, so it helps only where activations outweigh them.
    """
    train = config.train
    whole = train.batch_size * train.grad_accum
    leaner = LEANER[LEANER.index(train.optimizer) + 1 :] if train.optimizer in LEANER else LEANER
    kinds = (train.optimizer, *(k for k in LEANER if k != train.optimizer)) if every_optimizer else None

    def changed(**changes: Any) -> RunConfig:
        return dataclasses.replace(config, train=dataclasses.replace(train, **changes))

    for kind in kinds or (train.optimizer, *leaner):
        for remat in (True,) if train.remat else (False, True):
            yield changed(optimizer=kind, remat=remat, batch_size=whole, grad_accum=1)
    micro = whole
    while micro % 2 == 0:
        micro //= 2
        yield changed(optimizer=LEANER[-1], remat=True, batch_size=micro, grad_accum=whole // micro)


def plan_step(config: RunConfig, target: Target) -> Row:
    """Compile the training step of a configuration for the target."""
    programs = Programs.of(config, target)
    train = config.train
    tokens = jax.ShapeDtypeStruct((train.grad_accum, train.batch_size, config.model.seq_len + 1), jnp.int32)
    step = bound(target, programs.step, programs.state, tokens)
    return Row(
        config,
        programs.policy.compute,
        state_bytes(make_optimizer(train), programs.state.params),
        _size(programs.state.params) * MIB / totals(count_parameters(config.model)).total,
        step,
        step.fits(target),
    )


def search(config: RunConfig, target: Target, every_optimizer: bool = False) -> Iterator[Row]:
    """Compile one candidate after the other, to the first that fits; or one of each optimizer, without accumulation."""
    for candidate in candidates(config, every_optimizer):
        if every_optimizer and candidate.train.grad_accum > 1:
            return
        row = plan_step(candidate, target)
        yield row
        if row.fits and not every_optimizer:
            return


class Verdict(NamedTuple):
    """What a search has found."""

    row: Row
    """The first setting whose training step fits, else the one that takes least."""
    between: dict[str, float]
    """MiB of what runs between its steps."""
    total: float
    """MiB of the largest of all."""
    fits: bool

    def summary(self, target: Target) -> dict[str, Any]:
        """As JSON has it."""
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
            "remat": train.remat,
            "optimizer": train.optimizer,
        }


def verdict(rows: list[Row], target: Target) -> Verdict:
    """The setting to take, with what runs between its steps compiled too."""
    chosen = next((row for row in rows if row.fits), min(rows, key=lambda row: row.step.total))
    between = plan_inference(chosen.config, target)
    total = max(chosen.step.total, *between.values())
    return Verdict(chosen, between, total, chosen.fits and total <= target.budget)


def plan_inference(config: RunConfig, target: Target) -> dict[str, float]:
    """MiB of each program that a training run executes between steps, the waiting optimizer state included."""
    programs = Programs.of(config, target)
    params, seq_len = programs.state.params, config.model.seq_len
    waiting = _size(programs.state.optimizer)
    e = next(evaluation_windows(np.zeros(2, np.int32), seq_len=seq_len, batch_size=EVALUATION_ROWS))
    decoder = Decoder(programs.graphdef, seq_len, config.model.vocab_size)
    prompt = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    length = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(decoder.prefill, params, prompt, length)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    found = {
        "evaluation": bound(
            target, make_evaluation_step(programs.graphdef), params, e.inputs, e.targets, e.start, e.weights
        ),
        "prefill": bound(target, decoder.prefill, params, prompt, length),
        "decoding": bound(target, decoder.advance, params, state, token),
    }
    return {name: b.total + waiting for name, b in found.items()}


def measured_peak(config: RunConfig) -> float:
    """MiB that the first device held at most, until the end of the second training step."""
    device = jax.devices()[0]
    programs = Programs.of(config, device)
    params = initial_params(config, jax.random.key(config.train.seed))
    state = initial_state(params, make_optimizer(config.train), programs.policy.loss_scaling)
    del params
    tokens = np.zeros((config.train.grad_accum, config.train.batch_size, config.model.seq_len + 1), np.int32)
    for _ in range(2):
        state, _ = programs.step(state, tokens)
    jax.block_until_ready(state)
    return device.memory_stats()["peak_bytes_in_use"] / MIB


def _size(tree: Params) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / MIB
