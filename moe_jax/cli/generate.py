"""`moe-jax generate`."""

import sys
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
    speculate: int = 0
    """Guess this many tokens from earlier in the text, and verify them in one pass. The text is the same. 0 is off."""

    def execute(self) -> int:
        self.check()
        check_range("--num-stories", self.num_stories, 1, 10_000)
        check_range("--speculate", self.speculate, 0, 64)
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from moe_jax.inference.decode import Decoder
            from moe_jax.inference.generate import TextGenerator
            from moe_jax.inference.speculative import SpeculativeDecoder
            from moe_jax.runs.load import open_run

            run = open_run(self.run, self.step)
            shape = run.writer, run.config.model.seq_len, run.tokenizer.vocab_size
            decoder = SpeculativeDecoder(*shape, self.speculate) if self.speculate else Decoder(*shape)
            generator = TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len, decoder)
            run.tokenizer.encode(self.prompt)  # raises for a prompt that cannot be encoded, before anything is printed
            generator.compile()
            if isinstance(decoder, SpeculativeDecoder):
                decoder.compile(generator.params)
        settings = self.sampling()
        for number in range(self.num_stories):
            if self.num_stories > 1:
                print(f"--- {number + 1}")
            pieces = generator.pieces(self.prompt, settings, seed=self.seed, number=number, limit=self.max_tokens)
            stream_text(self.prompt, pieces)
        if isinstance(decoder, SpeculativeDecoder):
            print(f"speculation: {decoder.tally}", file=sys.stderr)
        return 0
