"""`moe-jax sft`."""

from dataclasses import dataclass
from typing import Any

from moe_jax.cli.arguments import Values
from moe_jax.cli.train import TrainingCommand
from moe_jax.config import ConfigError

RUN, INIT_FROM, FORMAT, SOURCE = ("", "base"), ("", "init_from"), ("data", "format"), ("data", "source")


@dataclass(frozen=True)
class Sft(TrainingCommand):
    """Fine-tune a trained run, or an imported model, on conversations.

    A conversation is a row of `{"messages": [{"role": "user", "content": "..."}, ...]}`. Only the assistant's answers
    are learned. With --lora RANK small adapters are trained, and the model's own weights stay as they are. The result
    is a run like any other; `chat --run` talks with it. Settings start from those of the run or model, with a short
    training at a low learning rate.
    """

    run: str = ""
    """Folder of the run to fine-tune: its best checkpoint is the start."""

    @classmethod
    def adapt(cls, own: dict[str, Any], flags: Values, file: Values) -> None:
        """Turn --run into the settings that fine-tuning needs. A run that is resumed has them already."""
        super().adapt(own, flags, file)
        run = own.get("run")
        if run:
            flags[RUN] = run
        values = file | flags
        if run or values.get(INIT_FROM):
            flags[FORMAT] = "chat"
        if values.get(("", "resume")):
            return
        if not run and not values.get(INIT_FROM):
            raise ConfigError(
                "--run: must be given, the folder of the run to fine-tune, or --init-from with a Hugging Face folder"
            )
        if SOURCE not in values:
            raise ConfigError("--data: must be given, a file of conversations (.jsonl); --help lists every flag")
