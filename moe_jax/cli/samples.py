"""`moe-jax samples`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_jax.cli.command import Command, check_range, check_run_folder, refuse_tuned
from moe_jax.cli.outputs import check_out_file
from moe_jax.cli.result import print_json
from moe_jax.system import environment
from moe_jax.system.console import step_progress, working
from moe_jax.system.terminal_text import say


@dataclass(frozen=True)
class Samples(Command):
    """Write texts at fixed prompts and seeds, as Markdown.

    The command also measures how much the model's texts repeat and vary, and compares them with validation texts of the
    same lengths. The last line of the output is JSON if it is asked for, or if the output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the page was not written"

    run: str
    """Folder of a run."""
    out: str = ""
    """The page to write. Empty: benchmarks/samples/NAME.md, where NAME is the run's folder."""
    stories: int = 32
    """Number of texts without a prompt that the model writes for the measures."""
    temperature: float = 0.8
    """Sampling temperature of all texts. 1 is the distribution that the model has learned."""
    max_tokens: int = 400
    """Longest text, in tokens."""
    step: int | None = None
    """Step of the checkpoint to load. The best one unless given."""
    json: bool = False
    """Print the measures as JSON too."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        refuse_tuned("samples", self.run)
        check_range("--stories", self.stories, 1, 10_000)
        check_range("--temperature", self.temperature, 0, 100)
        check_range("--max-tokens", self.max_tokens, 1, 1_000_000)
        if self.out:
            check_out_file("--out", self.out)
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from moe_jax.data.streams import stored_documents
            from moe_jax.experiments import samples
            from moe_jax.inference.generate import TextGenerator
            from moe_jax.inference.sampling import Sampling
            from moe_jax.runs.load import open_run
            from moe_jax.system.files import write_output

            run = open_run(self.run, self.step)
            generator = TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len)
            generator.compile()
        name = Path(self.run).resolve().name
        path = Path(self.out) if self.out else Path("benchmarks") / "samples" / f"{name}.md"
        settings, told = Sampling(temperature=self.temperature), []
        with step_progress("writing texts", self.stories) as advance:
            for number in range(self.stories):
                told.append(samples.write_text(generator, "", settings, seed=0, number=number, limit=self.max_tokens))
                advance()
        store, changed = run.validation_text()
        if changed:
            print(f"warning: {changed}", file=sys.stderr)
        measures = samples.measure(told, stored_documents(store.valid.tokens, run.tokenizer))
        about = [
            f"`uv run python -m moe_jax samples --run {shlex.quote(self.run)} --stories {self.stories} "
            f"--temperature {self.temperature:g} --max-tokens {self.max_tokens}`",
            f"checkpoint of step {run.checkpoint.step}, preset {run.config.preset}; each text below is the text that "
            "`generate` writes for its prompt, seed, temperature and longest length",
            f"measured: the first {samples.WORDS} words of {self.stories} texts written without a prompt, compared "
            "with draws of validation texts of the same numbers of words. "
            "repetition-4 is the share of four-word sequences that occurred earlier in the same text. distinct-n is "
            "the number of different n-word sequences divided by the number of all n-word sequences of all texts",
        ]
        about += [f"the validation text: {changed}"] if changed else []
        stories = samples.prompted(generator, settings, self.max_tokens)
        page = samples.to_markdown(f"Samples of {name}", about, measures, stories)
        write_output(path, page)
        say(page)
        say(f"{path}: {len(stories)} texts")
        result = {name: m.to_json() for name, m in measures.items()}
        settled = {"step": run.checkpoint.step, "stories": self.stories, "temperature": self.temperature}
        print_json(settled | result, self.json)
        return 0
