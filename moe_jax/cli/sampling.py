"""The arguments that every command that writes text takes: which model, how it draws, and how much it writes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_jax.cli.command import Command, check_range, check_run_folder

if TYPE_CHECKING:
    from moe_jax.inference.sampling import Sampling


@dataclass(frozen=True)
class SamplingCommand(Command):
    """A command that draws text from a trained model."""

    run: str
    """Folder of a run."""
    temperature: float = 0.8
    """Above 1 texts are more surprising, below 1 more usual. 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Draw among the tokens with at least this share of the likeliest token's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred before less likely; 1 is off."""
    max_tokens: int = 400
    """Longest continuation, in tokens. A text ends earlier where the model ends it."""
    seed: int = 0
    """The same seed gives the same texts."""
    step: int | None = None
    """Step of the checkpoint to load. The best one unless given."""

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        check_run_folder(self.run, self.step)
        check_range("--max-tokens", self.max_tokens, 1, 1_000_000)
        check_range("--temperature", self.temperature, 0, 100)
        check_range("--top-k", self.top_k, 0, 2**24)
        check_range("--top-p", self.top_p, 1e-6, 1)
        check_range("--min-p", self.min_p, 0, 1)
        check_range("--repetition-penalty", self.repetition_penalty, 1e-3, 1e3)
        check_range("--seed", self.seed, 0, 2**31 - 1)

    def sampling(self) -> "Sampling":
        from moe_jax.inference.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
