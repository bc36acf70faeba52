"""How `generate` and `chat` draw text: their parameters, and the model that is opened for them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.cli.options import Active, RunName, StepNumber, check_range, checked_run, starting
from moe_jax.runs.catalog import title

if TYPE_CHECKING:
    from moe_jax.inference.decode import TextGenerator
    from moe_jax.inference.sampling import Sampling
    from moe_jax.runs.load import LoadedRun


@dataclass(frozen=True)
class SamplingArguments:
    """How text is drawn from a trained model."""

    run: RunName = ""
    step: StepNumber = None
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
    active: Active = 0

    def checked_run(self) -> Path:
        """The folder of the run. Raises ConfigError if there is none, or if a value is out of range."""
        check_range("--max-tokens", self.max_tokens, 1, 1_000_000)
        check_range("--temperature", self.temperature, 0, 100)
        check_range("--top-k", self.top_k, 0, 2**24)
        check_range("--top-p", self.top_p, 1e-6, 1)
        check_range("--min-p", self.min_p, 0, 1)
        check_range("--repetition-penalty", self.repetition_penalty, 1e-3, 1e3)
        check_range("--seed", self.seed, 0, 2**31 - 1)
        return checked_run(self.run, self.step)

    def open(self, folder: Path) -> "tuple[LoadedRun, TextGenerator, Sampling]":
        """The model, loaded, and how it draws."""
        from moe_jax.inference.decode import TextGenerator
        from moe_jax.inference.sampling import Sampling
        from moe_jax.runs.load import open_run, with_fewer_experts

        run = open_run(folder, self.step)
        run = with_fewer_experts(run, self.active) if self.active else run
        settings = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return run, TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len), settings


def loading(folder: Path) -> AbstractContextManager[None]:
    """What the model is opened in."""
    return starting(f"loading {title(folder)}; the first start compiles for some seconds")
