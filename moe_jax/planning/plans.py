"""The recorded plans of the presets on well-known cards, which are there at once. `benchmarks/record_plans.py` writes
`plans.json`, and compiles anything else.

Nothing is imported that imports jax.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system.environment import MIB
from moe_jax.training.plan import MARGIN, Plan

RECORDED = Path(__file__).with_name("plans.json")
DEFAULT_GPU = "rtx3050-4gb"
PREALLOCATED = 0.75
"""Share of a card's memory that JAX takes at start by default (XLA_CLIENT_MEM_FRACTION). A program gets no more.
`system.environment` may choose another share for a small card; plans do not count on it."""
RECORD = "uv run --isolated --extra gpu-plan python benchmarks/record_plans.py"
"""The command that compiles a plan which is not recorded, in a clone of the project."""


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
    return ([Plan(**plan) for plan in found["plans"]], found["jaxlib"]) if found and same else ([], "")
