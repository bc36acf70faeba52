"""How long training will take on this machine, from the speed of one matrix product."""

import dataclasses
from typing import NamedTuple

from moe_jax.config import RunConfig
from moe_jax.model.costs import training_flops

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
    return max(1, int(seconds / ExpectedTime.of(_with_one_step(config), rate).slowest))


def _with_one_step(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1))


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
