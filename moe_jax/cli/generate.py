"""`moe-jax generate`."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.cli.command import check_range
from moe_jax.cli.sampling import SamplingCommand
from moe_jax.system import environment
from moe_jax.system.terminal import stream_text, working


@dataclass(frozen=True)
class Generate(SamplingCommand):
    """Continue a text with a trained model."""

    interrupted: ClassVar[str] = "the text ends here; the same --seed writes it again"

    prompt: str = ""
    """How each text begins."""
    num_stories: int = 1
    """Texts to write. Each has random draws of its own."""

    def execute(self) -> int:
        self.check()
        check_range("--num-stories", self.num_stories, 1, 10_000)
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from moe_jax.inference.generate import TextGenerator
            from moe_jax.runs.load import open_run

            run = open_run(self.run, self.step)
            generator = TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len)
            run.tokenizer.encode(self.prompt)  # raises for a prompt that cannot be encoded, before anything is printed
            generator.compile()
        settings = self.sampling()
        for number in range(self.num_stories):
            if self.num_stories > 1:
                print(f"--- {number + 1}")
            pieces = generator.pieces(self.prompt, settings, seed=self.seed, number=number, limit=self.max_tokens)
            stream_text(self.prompt, pieces)
        return 0
