"""The preset and the steps for a text and a time: `--preset auto`.

The text decides the largest preset. A preset is passed over if the time is too short for it. The steps read the text at
most USEFUL_PASSES times, and end in time.

Nothing is imported here that imports jax, so that a wrong flag is refused quickly.
"""

import dataclasses
import functools
from collections.abc import Container, Sequence
from typing import NamedTuple

from moe_jax.config import DataConfig, PresetName, RunConfig
from moe_jax.config.presets import PRESETS, preset_for_text, with_vocabulary
from moe_jax.data.corpora import open_corpus
from moe_jax.model.costs import (
    HIGHEST,
    LOWEST,
    USEFUL_PASSES,
    count_parameters,
    duration,
    expected_time,
    steps_within,
    totals,
)
from moe_jax.system.environment import runs_on_cpu

LEAST_TOKENS_PER_PARAMETER = 0.5
"""Tokens for each active parameter, below which the time is too short for a preset. A choice, not a measurement."""
SAMPLE_BYTES = 1_000_000
"""The tokenizer is learned on documents from the first one on, until they have this many bytes."""
STEPS = ("train", "steps")
"""The setting that is chosen beside the preset."""


class Choice(NamedTuple):
    """The settings for a text, and why."""

    config: RunConfig
    reasons: list[str]
    """Sentences: the text, what was passed over, the steps, the time."""


def choose(
    starts: Sequence[RunConfig], size: int | None, minutes: float, fixed: Container[tuple[str, str]] = ()
) -> Choice:
    """The first of the settings that suits a text of `size` bytes and the time. With `minutes`, the speed of a matrix
    product is measured; 0 stands for any time.

    `starts` are settings for the text, the largest model first. `fixed` are the fields that the user has set, which
    stay.
    """
    rate, limit = minutes and _matmul_rate(starts[0]), duration(60 * minutes)
    config, reasons = starts[0], ["text: its size is not known before it is read"]
    steps = useful = usual = tokens = 0
    if size is not None:
        reasons = [f"text: {size / 1e6:.2f} MB, about {size / bytes_per_token(config.data) / 1e6:.2f} M tokens"]
    for start in starts:
        sized, usual = with_vocabulary(start), start.train.steps
        in_time = steps_within(sized, rate, 60 * minutes) if minutes else usual
        useful = usual if size is None else useful_steps(start, size)
        steps = usual if STEPS in fixed else min(usual, in_time, useful)
        config = dataclasses.replace(start, train=dataclasses.replace(start.train, steps=steps))
        tokens, active = steps * config.tokens_per_step, totals(count_parameters(sized.model)).active
        if start is starts[-1] or not minutes or steps < in_time or tokens >= LEAST_TOKENS_PER_PARAMETER * active:
            break
        reasons.append(
            f"{start.preset}: passed over, because in {limit} it would read {tokens / 1e6:.2f} M tokens, fewer than "
            f"{LEAST_TOKENS_PER_PARAMETER:g} for each of its {active / 1e6:.1f} M active parameters"
        )
    read = f"steps: {steps:,} of {config.tokens_per_step:,} tokens"
    if size is not None:
        read += f", which read the text about {tokens * bytes_per_token(config.data) / size:.1f} times"
    if steps == useful < usual:
        read += f"; more than {USEFUL_PASSES} times teaches little"
    reasons.append(read)
    if minutes:
        reasons.append(
            f"time: {expected_time(with_vocabulary(config), rate)} of {limit}, if training reaches {HIGHEST:.0%} to "
            f"{LOWEST:.0%} of {rate / 1e9:,.0f} GFLOP/s; compiling, evaluations and checkpoints come on top"
        )
    return Choice(config, reasons)


def _matmul_rate(config: RunConfig) -> float:
    """Floating-point operations a second of one matrix product on this machine, measured now."""
    from moe_jax.model.precision import choose_policy
    from moe_jax.system.machine import matmul_rate

    return matmul_rate(choose_policy(config.execution.compute_dtype).compute)


def presets_for(source: str, size: int | None) -> list[PresetName]:
    """The presets that a text is large enough for, the largest first."""
    names: list[PresetName] = list(PRESETS)
    first = "nano" if source == "stories" else preset_for_text(size, runs_on_cpu())
    return list(reversed(names[: names.index(first) + 1]))


def useful_steps(config: RunConfig, size: int) -> int:
    """Steps that read the text of the settings, of `size` bytes, USEFUL_PASSES times; at least 1."""
    return max(1, round(USEFUL_PASSES * size / bytes_per_token(config.data) / config.tokens_per_step))


def text_bytes(source: str) -> int | None:
    """Bytes of the training documents of a text. None for a corpus whose size is not known before it is read."""
    from moe_jax.data.tokenizers import TRAINING_BYTES

    corpus = open_corpus(DataConfig(source=source))
    size = corpus.size("train")
    if size is None or size > TRAINING_BYTES:
        return size
    return sum(len(text.encode()) for text in corpus.documents("train"))


@functools.cache
def bytes_per_token(data: DataConfig) -> float:
    """Bytes of text for each token of the training stream, separators counted as tokens.

    An estimate: the tokenizer is learned on the first SAMPLE_BYTES of the text, and its tokens are counted there. For
    all of tiny Shakespeare (1.1 MB) the count of tokens is within 0.1 % of the run's own, and for 9.4 MB of TinyStories
    within 2 %.
    """
    from moe_jax.data.tokenizers import train_tokenizer

    texts, size = [], 0
    for text in open_corpus(data).documents("train"):
        texts.append(text)
        size += len(text.encode())
        if size >= SAMPLE_BYTES:
            break
    return size / sum(len(ids) + 1 for ids in train_tokenizer(data, texts).encode_batch(texts))
