"""`python -m moe_jax samples`."""

import json
from dataclasses import dataclass
from pathlib import Path

from moe_jax import environment
from moe_jax.commands import check_range, check_run_folder
from moe_jax.config import ConfigError


@dataclass(frozen=True)
class Samples:
    """Stories at fixed prompts and seeds, as Markdown; and how much the model repeats itself and varies, beside
    validation stories of the same lengths. The last line is JSON."""

    run: str
    """Folder of a run."""
    out: str = ""
    """The page to write; benchmarks/samples/NAME.md unless given, by the name of the run's folder."""
    stories: int = 32
    """Stories that the model tells from nothing, to be measured."""
    temperature: float = 0.8
    """Of all stories; 1 is the distribution that the model has learned."""
    max_tokens: int = 400
    """Longest story, in tokens."""
    step: int | None = None
    """Checkpoint to load; the best one unless given."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        check_range("--stories", self.stories, 1, 10_000)
        check_range("--temperature", self.temperature, 0, 100)
        check_range("--max-tokens", self.max_tokens, 1, 1_000_000)
        if self.out and Path(self.out).is_dir():
            raise ConfigError(f"--out {self.out}: is a folder; name a file")
        environment.prepare()
        from moe_jax.analysis import samples
        from moe_jax.inference.sampling import Sampling
        from moe_jax.inference.storyteller import Storyteller
        from moe_jax.training.run import load_run

        name = Path(self.run).resolve().name
        path = Path(self.out) if self.out else Path("benchmarks") / "samples" / f"{name}.md"
        run = load_run(self.run, self.step)
        teller = Storyteller(run.graphdef, run.params, run.tokenizer, run.config.model.seq_len)
        settings = Sampling(temperature=self.temperature)
        told = [
            samples.tell(teller, "", settings, seed=0, number=number, limit=self.max_tokens)
            for number in range(self.stories)
        ]
        measures = samples.measure(told, samples.validation_stories(run))
        about = [
            f"`uv run python -m moe_jax samples --run {self.run} --stories {self.stories} "
            f"--temperature {self.temperature:g} --max-tokens {self.max_tokens}`",
            f"checkpoint of step {run.checkpoint.step}, preset {run.config.preset}; each story below is also what "
            "`generate` tells for its prompt, seed, temperature and longest length",
            f"measured: the first {samples.WORDS} words of {self.stories} stories told from nothing, beside draws of "
            "validation stories with as many words. "
            "repetition-4 is the share of four-word sequences that stood in the same story before, distinct-n that of "
            "different n-word sequences among those of all stories",
        ]
        stories = samples.prompted(teller, settings, self.max_tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        page = samples.to_markdown(f"Samples of {name}", about, measures, stories)
        path.write_text(page, encoding="utf-8")
        print(page)
        print(f"{path}: {len(stories)} stories")
        result = {name: m.to_json() for name, m in measures.items()}
        settled = {"step": run.checkpoint.step, "stories": self.stories, "temperature": self.temperature}
        print(json.dumps(settled | result))
        return 0
