"""Before training: whether settings and text fit each other, and how long training will take on this machine."""

from typing import NamedTuple

from moe_jax.config import RunConfig
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model.costs import count_parameters, totals, training_flops

USEFUL_PASSES = 4
"""Reading a text up to four times is nearly as good as new text. More passes are worth less and less, and about 16 are
the end (Muennighoff et al. 2023, "Scaling data-constrained language models", section 5)."""
TOKENS_PER_PARAMETER = 20
"""Tokens for each active parameter at which a larger model pays (Hoffmann et al. 2022, "Training compute-optimal large
language models", table 3)."""


def advice(config: RunConfig, tokens: int, size: int) -> list[str]:
    """Sentences about the steps and the preset, for a training text of some tokens and bytes. Empty if both fit.

    Nothing is said of conversations: only the few tokens of their answers are learned, so they are read more often.
    """
    if config.data.format == "chat":
        return []
    train, step = config.train, config.tokens_per_step
    passes = train.steps * step / tokens
    said = []
    if passes > USEFUL_PASSES:
        often = f"{passes:.1f}" if passes < 10 else f"{passes:.0f}"
        fewer = round(USEFUL_PASSES * tokens / step)
        if fewer:
            cure = f"--steps {fewer} reads it {fewer * step / tokens:.0f} times"
        else:
            cure = f"one step reads it {step / tokens:.0f} times: give a smaller --batch-size, or more text"
        if train.steps > 3 * train.eval_every:
            cure += "; --set train.patience=3 stops when validation stops improving"
        said.append(
            f"{train.steps:,} steps read this text {often} times; passes after the first "
            f"{USEFUL_PASSES} teach less and less. {cure}"
        )
    if config.base:  # it has learned from another text before
        return said
    parameters = totals(count_parameters(config.model))
    if parameters.total > size and config.preset != "nano":
        said.append(
            f"the model has {parameters.total / 1e6:.1f} M parameters and the text {size / 1e6:.1f} MB: it can learn "
            "the text by heart; --preset nano is the smallest"
        )
    if passes < 1 and tokens > TOKENS_PER_PARAMETER * parameters.active and (larger := _larger(config)):
        said.append(
            f"{train.steps:,} steps read {passes:.0%} of this text; it is long enough for --preset {larger}, or for "
            f"--steps {round(tokens / step):,}"
        )
    return said


def _larger(config: RunConfig) -> str | None:
    """The smallest preset with twice the active parameters. None if there is none, or if the settings are no preset."""
    if config.preset not in PRESETS:
        return None
    here = totals(count_parameters(config.model)).active
    active = {name: totals(count_parameters(with_vocabulary(preset(name)).model)).active for name in PRESETS}
    above = {name: count for name, count in active.items() if count >= 2 * here}
    return min(above, key=lambda name: above[name]) if above else None


LOWEST, HIGHEST = 0.3, 0.6
"""A training step is expected to reach a share of the matmul rate between these two."""


class ExpectedTime(NamedTuple):
    """Seconds of training, between which the time is expected. Compiling, evaluations and checkpoints are not in it."""

    fastest: float
    slowest: float

    @classmethod
    def of(cls, config: RunConfig, rate: float) -> "ExpectedTime":
        """The time of a run on a machine of `rate` floating-point operations a second in one matrix product.

        The vocabulary size must be known (`with_vocabulary`).
        """
        flops = training_flops(config, config.train.steps)
        return cls(flops / (HIGHEST * rate), flops / (LOWEST * rate))

    def __str__(self) -> str:
        return f"{duration(self.fastest)} to {duration(self.slowest)}"


def steps_within(config: RunConfig, rate: float, seconds: float) -> int:
    """Most steps whose slowest expected time is at most `seconds`; at least 1."""
    return max(1, int(seconds * LOWEST * rate / training_flops(config, 1)))


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    for limit, size, unit in ((100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
