"""A plan of `planning.own_text` with its reasons, in sentences."""

import dataclasses
from collections.abc import Iterator, Sequence

from moe_jax.config import DataConfig, RunConfig
from moe_jax.config.presets import FIRST_BYTES, preset, with_vocabulary
from moe_jax.planning.own_text import Limits, TextPlan, useful_steps
from moe_jax.planning.text_size import bytes_per_token
from moe_jax.system.environment import runs_on_cpu
from moe_jax.training.advice import USEFUL_PASSES
from moe_jax.training.expected_time import HIGHEST, LOWEST, ExpectedTime, duration


def reasons(plan: TextPlan, passed_over: Sequence[TextPlan], size: int | None, limits: Limits) -> Iterator[str]:
    """The sentences that explain a plan: the text, what was passed over, the steps, the time, the memory.

    `size` is that of the text in bytes, None if it is not known.
    """
    yield _of_text(plan.config, size)
    for other in passed_over:
        yield f"{_named(other)}: passed over, because {other.problem}"
    yield _of_steps(plan, size, limits)
    if limits.seconds is not None:
        expected = ExpectedTime.of(with_vocabulary(plan.config), limits.rate)
        yield (
            f"time: {expected} of {duration(limits.seconds)}, if training reaches {HIGHEST:.0%} to {LOWEST:.0%} of "
            f"{limits.rate / 1e9:,.0f} GFLOP/s; compiling, evaluations and checkpoints come on top"
        )
    if plan.step_mib is not None:
        yield f"memory: a training step takes {plan.step_mib:,.0f} of {limits.mib:,.0f} MiB"
    if size is not None and not plan.config.init_from and not plan.config.upcycle:
        yield from warning(plan.config.data, size)


def warning(data: DataConfig, size: int) -> Iterator[str]:
    """A sentence with numbers, if a text of `size` bytes is too small for any preset."""
    smallest = dataclasses.replace(preset("nano"), data=data)
    steps, most = useful_steps(smallest, size), smallest.train.steps
    if steps < most:
        enough = most * smallest.tokens_per_step * bytes_per_token(smallest) / USEFUL_PASSES
        yield (
            f"warning: the text is too small for any preset. Its {size / 1e6:.2f} MB, read {USEFUL_PASSES} times, are "
            f"{steps:,} steps, and nano, the smallest preset, has {most:,}. About {enough / 1e6:.2f} MB would be enough"
        )


def _of_text(config: RunConfig, size: int | None) -> str:
    if size is None:
        return "text: its size is not known before it is read"
    known = f"text: {size / 1e6:.2f} MB, about {size / bytes_per_token(config) / 1e6:.2f} M tokens"
    for name, least in FIRST_BYTES.items():
        if size < least:
            known += f"; the next larger preset, {name}, is for {least / 1e6:,.0f} MB or more"
            return known + ", and for a GPU" * (name == "story-4gb" and runs_on_cpu())
    return known


def _of_steps(plan: TextPlan, size: int | None, limits: Limits) -> str:
    config, steps = plan.config, plan.config.train.steps
    text = f"steps: {steps:,} of {config.tokens_per_step:,} tokens"
    if size is not None:
        passes = steps * config.tokens_per_step * bytes_per_token(config) / size
        text += f", which read the text about {passes:.1f} times"
    if size is not None and steps == useful_steps(config, size):
        return f"{text}; more than {USEFUL_PASSES} times teaches little"
    if limits.seconds is not None and steps == limits.steps(config):
        return f"{text}; more would not end in time"
    return f"{text}, as preset {config.preset} has" if steps == preset(config.preset).train.steps else text


def _named(plan: TextPlan) -> str:
    train = plan.config.train
    if plan.step_mib is None:
        return plan.config.preset
    remat = " with remat" * plan.config.execution.remat
    return f"{plan.config.preset}, {train.batch_size} sequences x {train.grad_accum}{remat}"
