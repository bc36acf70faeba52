"""The preset and the steps for a text, the memory of this machine and a time: `plan --data` and `--preset auto`.

The text decides the largest preset. A preset is passed over if the time is too short for it. The training step is then
compiled for this machine's processor, and XLA says how much memory it takes. If that is too much, remat is tried, then
ever smaller micro-batches, and at the end a smaller preset.

Nothing is imported here that imports jax, so that a wrong flag is refused quickly.
"""

import dataclasses
import functools
import re
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from moe_jax.config import ConfigError, DataConfig, ExecutionConfig, PresetName, RunConfig, TrainConfig
from moe_jax.config.presets import FIRST_BYTES, PRESETS, preset, preset_for_text, with_vocabulary
from moe_jax.data.corpora import open_corpus
from moe_jax.model.costs import count_parameters, totals
from moe_jax.system.environment import machine_memory, runs_on_cpu
from moe_jax.training.advice import HIGHEST, LOWEST, USEFUL_PASSES, ExpectedTime, duration, steps_within

LEAST_TOKENS_PER_PARAMETER = 0.5
"""Tokens for each active parameter, below which the time is too short for a preset. A choice, not a measurement."""
SHARE_OF_MACHINE = 0.75
"""Share of this machine's memory that training may take, unless --memory says how much."""
UNKNOWN_MEMORY = 8e9
"""Bytes of memory that are assumed where the system does not say."""
SAMPLE_BYTES = 1_000_000
"""The tokenizer is learned on documents from the first one on, until they have this many bytes."""
STEPS, BATCH, ACCUMULATION = ("train", "steps"), ("train", "batch_size"), ("train", "grad_accum")
REMAT = ("execution", "remat")
"""The settings that are chosen beside the preset."""


class Limits(NamedTuple):
    """What training may take on this machine."""

    mib: float
    """Memory of a training step, in MiB."""
    seconds: float | None = None
    """Time of all training steps. None: as long as they take."""
    rate: float = 0.0
    """Floating-point operations a second of one matrix product on this machine. Read only if `seconds` is given."""

    @classmethod
    def of(cls, memory: str, minutes: float, config: RunConfig) -> "Limits":
        """From --memory and --minutes. With minutes, the speed of a matrix product is measured."""
        most = memory_bytes(memory) if memory else SHARE_OF_MACHINE * (machine_memory() or UNKNOWN_MEMORY)
        if not minutes:
            return cls(most / 2**20)
        from moe_jax.model.precision import choose_policy
        from moe_jax.system.machine import matmul_rate

        return cls(most / 2**20, 60 * minutes, matmul_rate(choose_policy(config.execution.compute_dtype).compute))

    def steps(self, config: RunConfig) -> int:
        """Most steps that are expected to end in time."""
        if self.seconds is None:
            return config.train.steps
        return steps_within(with_vocabulary(config), self.rate, self.seconds)


class Choice(NamedTuple):
    """The settings for a text, and why."""

    config: RunConfig
    """If nothing fits, the last settings that were tried."""
    step_mib: float
    """MiB that the training step takes, by XLA's plan."""
    fits: bool
    reasons: list[str]
    """Sentences: the text, what was passed over, the steps, the time, the memory."""


def choose(
    starts: Sequence[RunConfig], size: int | None, limits: Limits, fixed: Container[tuple[str, str]] = ()
) -> Choice:
    """The first of the settings that fits the limits, for a text of `size` bytes.

    `starts` are settings for the text, the largest model first. `fixed` are the fields that the user has set, which
    stay.
    """
    passed_over: list[str] = []
    config, needed = starts[-1], 0.0
    for start in starts:
        if STEPS not in fixed:
            most = limits.steps(start) if size is None else min(limits.steps(start), useful_steps(start, size))
            start = _with_training(start, steps=min(start.train.steps, most))
        tokens, active = start.train.steps * start.tokens_per_step, active_parameters(start)
        in_time = limits.seconds is None or start.train.steps < limits.steps(start)
        if start.preset != starts[-1].preset and not in_time and tokens < LEAST_TOKENS_PER_PARAMETER * active:
            passed_over.append(
                f"{start.preset}: passed over, because in {duration(limits.seconds or 0)} it would read "
                f"{tokens / 1e6:.2f} M tokens, fewer than {LEAST_TOKENS_PER_PARAMETER:g} for each of its "
                f"{active / 1e6:.1f} M active parameters"
            )
            continue
        for config in candidates(start, fixed):
            needed = step_mib(config)
            if needed <= limits.mib:
                first, *rest = reasons(config, size, limits)
                memory = f"memory: a training step takes {needed:,.0f} of {limits.mib:,.0f} MiB"
                new = not (config.init_from or config.upcycle)
                small = too_small(config.data, size) if new and size is not None else []
                return Choice(config, needed, True, [first, *passed_over, *rest, memory, *small])
            passed_over.append(f"{_named(config)}: a step takes {needed:,.0f} of {limits.mib:,.0f} MiB")
    return Choice(config, needed, False, passed_over)


def reasons(config: RunConfig, size: int | None, limits: Limits) -> Iterator[str]:
    """Sentences about the text, of `size` bytes, the steps and the time."""
    steps = config.train.steps
    text, read = (
        "text: its size is not known before it is read",
        f"steps: {steps:,} of {config.tokens_per_step:,} tokens",
    )
    if size is not None:
        tokens = size / bytes_per_token(config)
        text = f"text: {size / 1e6:.2f} MB, about {tokens / 1e6:.2f} M tokens"
        larger = next(((name, least) for name, least in FIRST_BYTES.items() if size < least), None)
        if larger is not None:
            text += f"; the next larger preset, {larger[0]}, is for {larger[1] / 1e6:,.0f} MB or more"
            text += ", and for a GPU" * (larger[0] == "story-4gb" and runs_on_cpu())
        read += f", which read the text about {steps * config.tokens_per_step / tokens:.1f} times"
    yield text
    if size is not None and steps == useful_steps(config, size):
        yield f"{read}; more than {USEFUL_PASSES} times teaches little"
    elif limits.seconds is not None and steps == limits.steps(config):
        yield f"{read}; more would not end in time"
    else:
        yield read
    if limits.seconds is not None:
        yield (
            f"time: {ExpectedTime.of(with_vocabulary(config), limits.rate)} of {duration(limits.seconds)}, if training "
            f"reaches {HIGHEST:.0%} to {LOWEST:.0%} of {limits.rate / 1e9:,.0f} GFLOP/s; compiling, evaluations and "
            "checkpoints come on top"
        )


def too_small(data: DataConfig, size: int) -> list[str]:
    """A sentence with numbers, if a text of `size` bytes is too small for any preset."""
    smallest = dataclasses.replace(preset("nano"), data=data)
    steps, most = useful_steps(smallest, size), smallest.train.steps
    if steps >= most:
        return []
    enough = most * smallest.tokens_per_step * bytes_per_token(smallest) / USEFUL_PASSES
    return [
        f"warning: the text is too small for any preset. Its {size / 1e6:.2f} MB, read {USEFUL_PASSES} times, are "
        f"{steps:,} steps, and nano, the smallest preset, has {most:,}. About {enough / 1e6:.2f} MB would be enough"
    ]


def presets_for(source: str, size: int | None) -> list[PresetName]:
    """The presets that a text is large enough for, the largest first."""
    names: list[PresetName] = list(PRESETS)
    first = "nano" if source == "stories" else preset_for_text(size, runs_on_cpu())
    return list(reversed(names[: names.index(first) + 1]))


def candidates(start: RunConfig, fixed: Container[tuple[str, str]] = ()) -> Iterator[RunConfig]:
    """The settings themselves, and then the same training with ever less memory."""
    yield start
    batch, accumulated = start.train.batch_size, start.train.grad_accum
    remat = dataclasses.replace(start.execution, remat=start.execution.remat or REMAT not in fixed)
    while True:
        lean = _with_training(start, batch_size=batch, grad_accum=accumulated)
        if (lean := dataclasses.replace(lean, execution=remat)) != start:
            yield lean
        if batch % 2 or BATCH in fixed or ACCUMULATION in fixed:
            return
        batch, accumulated = batch // 2, accumulated * 2


def _with_training(config: RunConfig, **changes: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def step_mib(config: RunConfig) -> float:
    """MiB that the training step takes on this machine's device, by XLA's plan of its buffers."""
    from moe_jax.planning.device_memory import Memory
    from moe_jax.training.programs import Programs

    train = config.train
    return Memory.of(Programs.of(with_vocabulary(config)).compiled_step(train.batch_size, train.grad_accum)).total


def active_parameters(config: RunConfig) -> int:
    return totals(count_parameters(with_vocabulary(config).model)).active


def useful_steps(config: RunConfig, size: int) -> int:
    """Steps that read the text of the settings, of `size` bytes, USEFUL_PASSES times; at least 1."""
    return max(1, round(USEFUL_PASSES * size / bytes_per_token(config) / config.tokens_per_step))


def text_bytes(source: str) -> int | None:
    """Bytes of the training documents of a text. None for a corpus whose size is not known before it is read."""
    from moe_jax.data.tokenizers import TRAINING_BYTES

    corpus = open_corpus(DataConfig(source=source))
    size = corpus.size("train")
    if size is None or size > TRAINING_BYTES:
        return size
    return sum(len(text.encode()) for text in corpus.documents("train"))


def bytes_per_token(config: RunConfig) -> float:
    """Bytes of text for each token of the training stream, separators counted as tokens.

    An estimate: the tokenizer is learned on the first SAMPLE_BYTES of the text, and its tokens are counted there. For
    all of tiny Shakespeare (1.1 MB) the count of tokens is within 0.1 % of the run's own, and for 9.4 MB of TinyStories
    within 2 %.
    """
    # Only what decides the text and the tokenizer, so that the answer is kept for settings with other steps.
    return _bytes_per_token(dataclasses.replace(config, out="", train=TrainConfig(), execution=ExecutionConfig()))


@functools.cache
def _bytes_per_token(config: RunConfig) -> float:
    from moe_jax.data.tokenizers import train_tokenizer
    from moe_jax.training.start import new_start

    texts, size = [], 0
    for text in open_corpus(config.data).documents("train"):
        texts.append(text)
        size += len(text.encode())
        if size >= SAMPLE_BYTES:
            break
    weights = new_start(config).weights(config)
    tokenizer = weights.tokenizer if weights else train_tokenizer(config.data, texts)
    return size / sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))


def memory_bytes(text: str) -> float:
    """Bytes of a size such as 8GB, 7.5GiB or 900MB. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--memory {text}: must be a size such as 8GB or 900MB")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)


def _named(config: RunConfig) -> str:
    train = config.train
    return f"{config.preset}, {train.batch_size} sequences x {train.grad_accum}{' with remat' * config.execution.remat}"
