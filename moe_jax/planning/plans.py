"""A plan: one setting, and the memory of its programs. The plans of the presets on well-known cards are recorded in
`plans.json`, so that they are there at once. `benchmarks/record_plans.py` writes it, and compiles anything else.

Nothing is imported that imports jax.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system.environment import MIB

RECORDED = Path(__file__).with_name("plans.json")
DEFAULT_GPU = "rtx3050-4gb"
PREALLOCATED = 0.75
"""Share of a card's memory that JAX takes at start by default (XLA_PYTHON_CLIENT_MEM_FRACTION). A program gets no more.
`system.environment` may choose another share for a small card; plans do not count on it."""
MARGIN = 0.85
"""Share of JAX's memory that a plan may use. The rest is for memory that XLA's buffer plan leaves out: loaded kernels,
handles and workspaces of libraries, scratch memory of autotuning, and fragmentation."""
RECORD = "uv run --isolated --extra gpu-plan python benchmarks/record_plans.py"
"""The command that compiles a plan which is not recorded, in a clone of the project."""
SETTING = (
    *(("train", name) for name in ("batch_size", "grad_accum", "optimizer", "param_dtype")),
    ("execution", "remat"),
)
"""The settings in which the plans of a run differ."""


class KnownCard(NamedTuple):
    """An NVIDIA card with recorded plans, by its maker's figures."""

    name: str
    device_kind: str
    """As `jax.Device.device_kind` says it."""
    compute_capability: str
    """Such as "8.6"."""
    memory: int
    """Bytes that the card reports."""
    bandwidth: float
    """Bytes a second, read and written."""
    float32: float
    """Floating-point operations a second of a matrix product in float32: cores x clock."""
    narrow: float
    """The same for bfloat16 or float16 operands."""

    @property
    def budget(self) -> float:
        """MiB that a plan may use: 85 % of JAX's share, which is 75 % of the card's memory. The CUDA context and a
        display use the rest of the card."""
        return MARGIN * PREALLOCATED * self.memory / MIB


class Plan(NamedTuple):
    """One setting, and the memory of its programs."""

    config: RunConfig
    precision: str
    least: float
    """MiB that a training step needs whatever the compiler does."""
    programs: dict[str, float]
    """MiB of the compiled programs, with what is in memory beside them. The step comes first. The others are there only
    if it fits; nothing is there if `least` does not fit."""
    attention: str = ""
    """The form of attention in training, and the reason for it."""

    @property
    def total(self) -> float:
        """MiB of the largest program. At least that if the step was not compiled."""
        return max(self.programs.values(), default=self.least)

    def fits(self, budget: float) -> bool:
        return len(self.programs) > 1 and self.total <= budget

    def summary(self, gpu: str, budget: float) -> dict[str, Any]:
        """For JSON output."""
        return {
            "preset": self.config.preset,
            "gpu": gpu,
            "precision": self.precision,
            "total_mib": round(self.total, 1),
            "budget_mib": round(budget, 1),
            "fits": self.fits(budget),
            "micro_batch": self.config.train.batch_size,
            **{name: getattr(self.config.section(section), name) for section, name in SETTING[1:]},
        }

    def to_json(self) -> dict[str, Any]:
        """The plan without the settings that all plans of a run share."""
        programs = {name: round(mib, 1) for name, mib in self.programs.items()}
        own = {"precision": self.precision, "least": round(self.least, 1), "attention": self.attention}
        return {"setting": values_of(self.config, SETTING), **own, "programs": programs}

    @classmethod
    def from_json(cls, values: dict[str, Any], config: RunConfig) -> "Plan":
        """A plan of the run `config`."""
        own = (values[name] for name in ("precision", "least", "programs", "attention"))
        return cls(with_values(config, values["setting"]), *own)


def values_of(config: RunConfig, keys: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Some settings of a run for JSON, by SECTION.NAME."""
    return {f"{section}.{name}": getattr(config.section(section), name) for section, name in keys}


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The run with other values, as `values_of` gives them."""
    return config.override({(key.partition(".")[0], key.partition(".")[2]): value for key, value in values.items()})


def named(config: RunConfig) -> str:
    """A setting in a few words."""
    train = config.train
    batch = f"{train.batch_size} x {train.grad_accum}" if train.grad_accum > 1 else f"{train.batch_size}"
    kind = train.optimizer if train.param_dtype == "float32" else f"{train.optimizer}, {train.param_dtype} weights"
    return f"{batch} sequences{' with remat' if config.execution.remat else ''}, {kind}"


def chosen(plans: Sequence[Plan], budget: float) -> Plan:
    """The plan to use, of those that `fitting.plans_until_one_fits` gives: the one that fits, or else the smallest."""
    return next((plan for plan in plans if plan.fits(budget)), min(plans, key=lambda plan: plan.total))


# What is recorded


@functools.cache
def _recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def known_cards() -> dict[str, KnownCard]:
    """The cards with recorded plans, by name."""
    return {name: KnownCard(name, **facts) for name, facts in _recorded()["cards"].items()}


def known_card(name: str) -> KnownCard:
    """The card of this name. Raises ConfigError if it has no recorded plans."""
    cards = known_cards()
    if name not in cards:
        raise ConfigError(f"--gpu {name}: must be one of {', '.join(cards)}; for others: {RECORD} --help")
    return cards[name]


def recorded(config: RunConfig, card: KnownCard) -> tuple[list[Plan], str]:
    """The plans of these settings on this card, and the version of jaxlib that compiled them. Empty unless the model,
    the training and its execution are those of the preset. `config.model.vocab_size` must not be 0."""
    usual = with_vocabulary(preset(config.preset))
    found = _recorded()["plans"].get(f"{config.preset} {card.name}")
    same = all(getattr(config, part) == getattr(usual, part) for part in ("model", "train", "execution"))
    return ([Plan.from_json(plan, config) for plan in found["plans"]], found["jaxlib"]) if found and same else ([], "")
