"""`train.py` and `moe-jax train`: the settings of a run, which `training/run.py` then trains."""

from collections.abc import Sequence

from moe_jax.cli.settings import TrainingArguments, parse_settings, train_as_asked
from moe_jax.training.start import Start

ONLY_TUNING = ("base", "format", "lora_rank", "lora_alpha", "train_router")


def train(argv: Sequence[str], prog: str) -> int:
    """Train a sparse mixture-of-experts language model.

    Settings start from a preset, or from the run or model that --resume, --upcycle or --init-from names. Flags change
    them. The defaults that are shown are those of the preset.
    """
    return train_as_asked(*parse(argv, prog), "train.py")


def parse(argv: Sequence[str], prog: str = "train.py") -> tuple[TrainingArguments, Start]:
    """The arguments with the values from argv, and what the run starts from. Raises ConfigError."""
    return parse_settings(argv, prog, train.__doc__, {}, hidden=ONLY_TUNING)
