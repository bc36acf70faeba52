"""The preset and the settings for a text and for the memory of this machine: `plan --data TEXT --memory SIZE`.

The text decides the preset and the steps. The training step is then compiled for this machine's processor, and XLA says
how much memory it takes. If that is too much, remat is tried, then ever smaller micro-batches, and at the end a smaller
preset.
"""

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_jax.config import DataConfig, PresetName, RunConfig, UserError
from moe_jax.config.presets import PRESETS, preset, preset_for_text, with_vocabulary
from moe_jax.data.corpora import open_corpus
from moe_jax.planning.target import MIB
from moe_jax.system.environment import runs_on_cpu
from moe_jax.training.advice import USEFUL_PASSES
from moe_jax.training.programs import Programs

BYTES_PER_TOKEN = 3.0
"""Of a `bpe` tokenizer of 1,024 to 4,096 entries. English prose has 2.3 to 3.7, measured on plays and on stories."""


class TextPlan(NamedTuple):
    """Settings for a text, and the memory of their training step."""

    config: RunConfig
    step_mib: float
    fits: bool

    def command(self) -> str:
        """The command line that trains with these settings."""
        config, start = self.config, preset(self.config.preset)
        words = ["uv run train.py", *origin_flags(config), f"--preset {config.preset}"]
        words.append(f"--data {shlex.quote(config.data.source)}")
        words.append(f"--out {shlex.quote('runs/' + Path(config.data.source).stem)}")
        for name, flag in (("steps", "--steps"), ("batch_size", "--batch-size"), ("grad_accum", "--grad-accum")):
            if getattr(config.train, name) != getattr(start.train, name):
                words.append(f"{flag} {getattr(config.train, name)}")
        if config.execution.remat and not start.execution.remat:
            words.append("--execution.remat")
        return " ".join(words)


def origin_flags(config: RunConfig) -> list[str]:
    """The flags that say which model a run starts from. None for a start from noise."""
    given = {"--init-from": config.init_from, "--upcycle": config.upcycle}
    return [f"{flag} {shlex.quote(folder)}" for flag, folder in given.items() if folder]


def text_bytes(source: str) -> int | None:
    """Bytes of the training text. None for a corpus whose size is not known before it is read."""
    return open_corpus(DataConfig(source=source)).size("train")


def with_steps(config: RunConfig, size: int | None) -> RunConfig:
    """The settings, with no more steps than read a text of `size` bytes USEFUL_PASSES times."""
    if size is None:
        return config
    tokens = size / BYTES_PER_TOKEN
    a_step = config.train.batch_size * config.train.grad_accum * config.model.seq_len
    most = max(1, round(USEFUL_PASSES * tokens / a_step))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=min(config.train.steps, most)))


def candidates(source: str, size: int | None, imported: RunConfig | None = None) -> Iterator[RunConfig]:
    """Settings for a text: those of its preset, with ever less memory, and then those of smaller presets. For an
    `imported` model only its own settings, with ever less memory."""
    names: list[PresetName] = list(PRESETS)
    first = "nano" if source == "stories" else preset_for_text(size, runs_on_cpu())
    presets = [preset(name) for name in reversed(names[: names.index(first) + 1])]
    for start in presets if imported is None else [imported]:
        start = with_steps(dataclasses.replace(start, data=dataclasses.replace(start.data, source=source)), size)
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


def search(source: str, most_mib: float, imported: RunConfig | None = None) -> Iterator[TextPlan]:
    """The candidates with their memory, to the first that fits. Raises the errors of `open_corpus`."""
    size = text_bytes(source)
    if size is not None and size < BYTES_PER_TOKEN * preset("nano").model.seq_len:
        raise UserError(f"--data {Path(source)}: {size} bytes are too little to train on; give a longer text")
    for config in candidates(source, size, imported):
        needed = step_mib(config)
        yield TextPlan(config, needed, needed <= most_mib)
        if needed <= most_mib:
            return
