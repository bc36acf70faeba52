"""`moe-jax sft`: a trained run, or an imported model, learns to answer."""

from collections.abc import Sequence

from moe_jax.cli.settings import TrainingArguments, parse_settings, train_as_asked
from moe_jax.training.start import Start


def sft(argv: Sequence[str], prog: str) -> int:
    """Fine-tune a trained run, or an imported model, on conversations.

    A conversation is a row of {"messages": [{"role": "user", "content": "..."}, ...]}. Only the assistant's answers are
    learned. With --lora RANK small adapters are trained, and the model's own weights stay as they are. The result is a
    run like any other; chat --run talks with it. Settings start from those of the run or model, with a short training
    at a low learning rate.
    """
    return train_as_asked(*parse(argv, prog), "moe-jax sft")


def parse(argv: Sequence[str], prog: str = "moe-jax sft") -> tuple[TrainingArguments, Start]:
    """The arguments with the values from argv, and what the run starts from. Raises ConfigError."""
    return parse_settings(argv, prog, sft.__doc__, {("data", "format"): "chat"}, hidden=["upcycle", "format"])
