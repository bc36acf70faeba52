"""The plan for a text on this machine, for `plan --data` and for `train.py --preset auto`."""

import re
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.cli.command import check_range
from moe_jax.config import ConfigError, RunConfig
from moe_jax.system.environment import machine_memory
from moe_jax.system.terminal import working

if TYPE_CHECKING:
    from moe_jax.planning.own_text import Change, Limits, TextPlan

SHARE_OF_MACHINE = 0.75
"""Share of this machine's memory that a plan may use, unless --memory says how much."""
UNKNOWN_MEMORY = 8e9
"""Bytes of memory that are assumed where the system does not say."""
MOST_MINUTES, MOST_GFLOPS = 1e6, 1e9


class TextPlans(NamedTuple):
    """What was tried for a text. The last one is the plan if it fits."""

    tried: "list[TextPlan]"
    limits: "Limits"
    reasons: list[str]
    """Sentences. Empty if nothing fits."""

    @property
    def last(self) -> "TextPlan":
        return self.tried[-1]


class Given(NamedTuple):
    """What the user gives training on this machine."""

    memory: str
    """A size such as 8GB. Empty: three quarters of the machine's memory."""
    minutes: float
    """0: no limit."""
    gflops: float
    """Speed of one matrix product in 10^9 operations a second. 0: measured now."""

    def check(self) -> None:
        """Raise ConfigError for a value that is not allowed."""
        check_range("--minutes", self.minutes, 0, MOST_MINUTES)
        check_range("--gflops", self.gflops, 0, MOST_GFLOPS)
        if self.gflops and not self.minutes:
            raise ConfigError(f"--gflops {self.gflops:g}: says how long steps take; give --minutes too")
        if self.memory:
            memory_bytes(self.memory)

    def limits(self, config: RunConfig) -> "Limits":
        """The limits for a plan. Measures the speed of a matrix product if it is needed and not given."""
        from moe_jax.model.precision import choose_policy
        from moe_jax.planning.own_text import Limits
        from moe_jax.system.machine import matmul_rate

        most = memory_bytes(self.memory) if self.memory else SHARE_OF_MACHINE * (machine_memory() or UNKNOWN_MEMORY)
        if not self.minutes:
            return Limits(most / 2**20)
        with working("measuring the speed of a matrix product"):
            rate = self.gflops * 1e9 or matmul_rate(choose_policy(config.execution.compute_dtype).compute)
        return Limits(most / 2**20, 60 * self.minutes, rate)


def plan_for_text(
    source: str, given: Given, asked: RunConfig, imported: RunConfig | None = None, change: "Change | None" = None
) -> TextPlans:
    """Try settings for a text until some fit. The environment must be prepared for jax.

    `asked` has the precision that is asked for. Raises the errors of `own_text.search`.
    """
    with working("starting JAX"):
        from moe_jax.planning import own_text, plan_in_words, text_size
    limits = given.limits(asked)
    plans = own_text.search(source, limits, imported, change or (lambda config: config))
    tried: list[TextPlan] = []
    while not tried or not tried[-1].fits:
        with working("counting the tokens of the text, and compiling a training step to see its memory"):
            following = next(plans, None)
        if following is None:
            return TextPlans(tried, limits, [])
        tried.append(following)
    found = plan_in_words.reasons(tried[-1], tried[:-1], text_size.text_bytes(source), limits)
    return TextPlans(tried, limits, list(found))


def memory_bytes(text: str) -> float:
    """Bytes of a size such as 8GB, 7.5GiB or 900MB. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--memory {text}: must be a size such as 8GB or 900MB")
    return float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)
