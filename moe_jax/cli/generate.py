"""`moe-jax generate`."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.cli.command import Command, check_range, check_run_folder
from moe_jax.system import environment


@dataclass(frozen=True)
class Generate(Command):
    """Continue a text with a trained model."""

    interrupted: ClassVar[str] = "the text ends here; the same --seed writes it again"

    run: str
    """Folder of a run."""
    prompt: str = ""
    """How each text begins."""
    num_stories: int = 1
    """Texts to write. Each has random draws of its own."""
    max_tokens: int = 400
    """Longest continuation of the prompt, in tokens. A text ends earlier where the model ends it."""
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
    seed: int = 0
    """The same seed gives the same texts."""
    step: int | None = None
    """Step of the checkpoint to load. The best one unless given."""

    def execute(self) -> int:
        self._check()
        environment.prepare_environment()
        from moe_jax.inference.generate import TextGenerator
        from moe_jax.inference.sampling import Sampling
        from moe_jax.runs.load import open_run

        run = open_run(self.run, self.step)
        generator = TextGenerator(run.graphdef, run.params, run.tokenizer, run.config.model.seq_len)
        run.tokenizer.encode(self.prompt)  # raises for a prompt that cannot be encoded, before anything is printed
        settings = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        for number in range(self.num_stories):
            if self.num_stories > 1:
                print(f"--- {number + 1}")
            print(self.prompt, end="", flush=True)
            for piece in generator.pieces(self.prompt, settings, seed=self.seed, number=number, limit=self.max_tokens):
                print(piece, end="", flush=True)
            print(flush=True)
        return 0

    def _check(self) -> None:
        check_run_folder(self.run, self.step)
        check_range("--num-stories", self.num_stories, 1, 10_000)
        check_range("--max-tokens", self.max_tokens, 1, 1_000_000)
        check_range("--temperature", self.temperature, 0, 100)
        check_range("--top-k", self.top_k, 0, 2**24)
        check_range("--top-p", self.top_p, 1e-6, 1)
        check_range("--min-p", self.min_p, 0, 1)
        check_range("--repetition-penalty", self.repetition_penalty, 1e-3, 1e3)
        check_range("--seed", self.seed, 0, 2**31 - 1)
