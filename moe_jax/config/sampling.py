"""How text is drawn from a trained model: the flags of `generate` and `chat`, and the arguments of `Run.generate`."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.config.section import Section, setting


@dataclass(frozen=True)
class SamplingConfig(Section):
    """How text is drawn. The filters (top-k, top-p, min-p) are derived in chapter 15 of `foundation`."""

    section_name: ClassVar[str] = ""

    temperature: float = setting(0.8, within=(0, 100))
    """Above 1 texts are more surprising, below 1 more usual. 0 always takes the likeliest token."""
    top_k: int = setting(0, within=(0, 2**24))
    """Draw among the k likeliest tokens only; 0 is off."""
    top_p: float = setting(1.0, within=(1e-6, 1))
    """Draw among the fewest likeliest tokens that together have this probability; 1 is off."""
    min_p: float = setting(0.0, within=(0, 1))
    """Draw among the tokens with at least this share of the likeliest token's probability; 0 is off."""
    repetition_penalty: float = setting(1.0, within=(1e-3, 1e3))
    """Above 1 makes tokens that occurred before less likely; 1 is off."""
    max_tokens: int = setting(400, within=(1, 1_000_000))
    """Longest continuation, in tokens. A text ends earlier where the model ends it."""
    seed: int = setting(0, within=(0, 2**31 - 1))
    """The same seed gives the same texts."""
