"""`train.py` and `moe-jax train`: the settings of a run, which `training/run.py` then trains."""

from collections.abc import Sequence

from moe_jax.cli.settings import TrainingArguments, parse_settings, train_as_asked


def train(argv: Sequence[str], prog: str) -> int:
    """Train a sparse mixture-of-experts language model.

    Settings start from a preset, or from the run or model that --resume, --upcycle or --init-from names. Flags change
    them. The defaults that are shown are those of the preset.
    """
    tuning = ["base", "format", "lora_rank", "lora_alpha", "train_router"]
    arguments, start = parse_settings(TrainingArguments(), argv, prog, train.__doc__, {}, hidden=tuning)
    return train_as_asked(arguments, start, "train.py")
