"""`moe-jax sft`: a trained run, or an imported model, learns to answer."""

from collections.abc import Sequence

from moe_jax.cli.settings import TrainingArguments, parse_settings, train_as_asked
from moe_jax.config import ConfigError, DataConfig
from moe_jax.runs.catalog import run_folder


def sft(argv: Sequence[str], prog: str) -> int:
    """Fine-tune a trained run, or an imported model, on conversations.

    A conversation is a row of {"messages": [{"role": "user", "content": "..."}, ...]}. Only the assistant's answers are
    learned. With --lora RANK small adapters are trained, and the model's own weights stay as they are. The result is a
    run like any other; chat --run talks with it. Settings start from those of the run or model, with a short training
    at a low learning rate.
    """
    chats = {("data", "format"): "chat"}
    arguments, start = parse_settings(TrainingArguments(), argv, prog, sft.__doc__, chats, hidden=["upcycle"])
    config = arguments.config
    if start.saved is None and not (config.base or config.init_from):
        raise ConfigError(
            "--run: must be given, the folder of the run to fine-tune, or --init-from with a Hugging Face folder"
        )
    if start.saved is None and config.data.source == DataConfig.source:
        raise ConfigError("--data: must be given, a file of conversations (.jsonl)")
    return train_as_asked(arguments, start, "moe-jax sft")
