"""The preset and the settings for a text, the memory of this machine and a time: `plan --data` and `--preset auto`.

The text decides the largest preset. A preset is passed over if the time is too short for it. The training step is then
compiled for this machine's processor, and XLA says how much memory it takes. If that is too much, remat is tried, then
ever smaller micro-batches, and at the end a smaller preset.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_jax.config import PresetName, RunConfig, UserError, holds_run
from moe_jax.config.presets import PRESETS, folder_for_text, preset, preset_for_text, with_vocabulary
from moe_jax.model.costs import count_parameters, totals
from moe_jax.planning.text_size import bytes_per_token, text_bytes
from moe_jax.system.environment import MIB, runs_on_cpu
from moe_jax.system.errors import FieldError
from moe_jax.training.advice import USEFUL_PASSES
from moe_jax.training.expected_time import duration, steps_within
from moe_jax.training.programs import Programs

LEAST_TOKENS_PER_PARAMETER = 0.5
"""Tokens for each active parameter, below which the time is too short for a preset. A choice, not a measurement."""

type Change = Callable[[RunConfig], RunConfig]


class Limits(NamedTuple):
    """What training may take on this machine."""

    mib: float
    """Memory of a training step, in MiB."""
    seconds: float | None = None
    """Time of all training steps. None: as long as they take."""
    rate: float = 0.0
    """Floating-point operations a second of one matrix product on this machine. Read only if `seconds` is given."""

    def steps(self, config: RunConfig) -> int:
        """Most steps that are expected to end in time."""
        if self.seconds is None:
            return config.train.steps
        return steps_within(with_vocabulary(config), self.rate, self.seconds)


class TextPlan(NamedTuple):
    """Settings for a text, and the memory of their training step."""

    config: RunConfig
    step_mib: float | None
    """None if the settings were passed over for another reason, without compiling them."""
    problem: str
    """Why the settings are passed over, in a sentence. Empty if they fit."""

    @property
    def fits(self) -> bool:
        return not self.problem

    def command(self) -> str:
        """The command line that trains with these settings."""
        config, start = self.config, preset(self.config.preset)
        words = ["uv run train.py", *origin_flags(config), f"--preset {config.preset}"]
        words.append(f"--data {shlex.quote(config.data.source)}")
        words.append(f"--out {shlex.quote(free_folder(config.data.source))}")
        for name, flag in (("steps", "--steps"), ("batch_size", "--batch-size"), ("grad_accum", "--grad-accum")):
            if getattr(config.train, name) != getattr(start.train, name):
                words.append(f"{flag} {getattr(config.train, name)}")
        if config.execution.remat and not start.execution.remat:
            words.append("--execution.remat")
        return " ".join(words)


def free_folder(source: str) -> str:
    """The folder of a new run on a text: named after the text, with a number if that folder holds a run."""
    name = folder_for_text(source)
    folders = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in folders if not holds_run(Path(folder)))


def origin_flags(config: RunConfig) -> list[str]:
    """The flags that say which model a run starts from. None for a start from noise."""
    given = {"--init-from": config.init_from, "--upcycle": config.upcycle}
    return [f"{flag} {shlex.quote(folder)}" for flag, folder in given.items() if folder]


def useful_steps(config: RunConfig, size: int) -> int:
    """Steps that read the text of the settings, of `size` bytes, USEFUL_PASSES times; at least 1."""
    return max(1, round(USEFUL_PASSES * size / bytes_per_token(config) / config.tokens_per_step))


def with_steps(config: RunConfig, size: int | None, limits: Limits) -> RunConfig:
    """The settings, with no more steps than `useful_steps` of a text of `size` bytes, and than the time allows."""
    steps = min(config.train.steps, limits.steps(config))
    if size is not None:
        steps = min(steps, useful_steps(config, size))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def presets_for(source: str, size: int | None) -> list[RunConfig]:
    """The presets that a text is large enough for, the largest first."""
    names: list[PresetName] = list(PRESETS)
    first = "nano" if source == "stories" else preset_for_text(size, runs_on_cpu())
    return [preset(name) for name in reversed(names[: names.index(first) + 1])]


def candidates(start: RunConfig) -> Iterator[RunConfig]:
    """The settings themselves, and then the same training with ever less memory."""
    yield start
    yield dataclasses.replace(start, execution=dataclasses.replace(start.execution, remat=True))
    batch, accumulated = start.train.batch_size, start.train.grad_accum
    while batch % 2 == 0:
        batch, accumulated = batch // 2, accumulated * 2
        train = dataclasses.replace(start.train, batch_size=batch, grad_accum=accumulated)
        execution = dataclasses.replace(start.execution, remat=True)
        yield dataclasses.replace(start, train=train, execution=execution)


def step_mib(config: RunConfig) -> float:
    """MiB that the training step takes on this machine's device, by XLA's plan of its buffers."""
    train = config.train
    memory = Programs.of(with_vocabulary(config)).compiled_step(train.batch_size, train.grad_accum).memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes) / MIB


def search(
    source: str, limits: Limits, imported: RunConfig | None = None, change: Change = lambda config: config
) -> Iterator[TextPlan]:
    """The settings that are tried, to the first that fit: those of the text's preset, then those of smaller presets. Of
    an `imported` model only its own.

    `change` makes the changes that the user has asked for. Settings that it would undo are not tried. Raises the errors
    of `open_corpus`; UserError for a text that is too short; FieldError if the changes fit no preset.
    """
    size = text_bytes(source)
    if size is not None and size < preset("nano").model.seq_len:
        raise UserError(f"--data {Path(source)}: {size} bytes are too little to train on; give a longer text")
    starts = list(changed(presets_for(source, size) if imported is None else [imported], change))
    for start in starts:
        start = dataclasses.replace(start, data=dataclasses.replace(start.data, source=source))
        start = change(with_steps(start, size, limits))
        if start.preset != starts[-1].preset and (problem := too_short(start, limits)):
            yield TextPlan(start, None, problem)
            continue
        for config in candidates(start):
            if change(config) != config:
                continue
            needed = step_mib(config)
            problem = "" if needed <= limits.mib else f"a step takes {needed:,.0f} of {limits.mib:,.0f} MiB"
            yield TextPlan(config, needed, problem)
            if not problem:
                return


def changed(starts: list[RunConfig], change: Change) -> Iterator[RunConfig]:
    """The presets with the user's changes, where they can be made. Raises FieldError if they fit no preset."""
    refused = None
    found = False
    for start in starts:
        try:
            yield change(start)
            found = True
        except FieldError as error:
            refused = error
    if not found and refused is not None:
        raise refused


def too_short(config: RunConfig, limits: Limits) -> str:
    """Why the time is too short for a preset, in a sentence. Empty if it is long enough."""
    if limits.seconds is None or config.train.steps < limits.steps(config):
        return ""
    tokens = config.train.steps * config.tokens_per_step
    active = totals(count_parameters(with_vocabulary(config).model)).active
    if tokens >= LEAST_TOKENS_PER_PARAMETER * active:
        return ""
    return (
        f"in {duration(limits.seconds)} it would read {tokens / 1e6:.2f} M tokens, fewer than "
        f"{LEAST_TOKENS_PER_PARAMETER:g} for each of its {active / 1e6:.1f} M active parameters"
    )
