"""How `generate` and `chat` draw text: their parameters, and the model that is opened for them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.cli.options import Active, RunName, StepNumber, checked_run, starting
from moe_jax.config.sampling import SamplingConfig
from moe_jax.runs.catalog import title

if TYPE_CHECKING:
    from moe_jax.inference.decode import TextGenerator
    from moe_jax.inference.sampling import Sampling
    from moe_jax.runs.load import LoadedRun


@dataclass(frozen=True)
class SamplingArguments(SamplingConfig):
    """How text is drawn from a trained model."""

    run: RunName = ""
    step: StepNumber = None
    active: Active = 0

    def checked_run(self) -> Path:
        """The folder of the run. Raises ConfigError if there is none."""
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
