"""What a run starts with: the size of its vocabulary, and the weights of a run that does not start from noise. The seam
of `imported.py`, `sft.py` and `upcycle.py`."""

import dataclasses
from typing import Any, NamedTuple, Protocol

from moe_jax.config import ModelConfig, RunConfig, UserError
from moe_jax.data.token_store import TokenStore
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.costs import training_flops
from moe_jax.model.transformer import Params
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.training.programs import Programs


class Start(NamedTuple):
    """What a run starts with that does not start from noise."""

    params: Params
    origin: dict[str, Any]
    """The record of it in config.json and in the checkpoints. `training_flops` is what it took to train, None if that
    is not known."""
    note: str
    """One line for the user."""


def origin_of(kind: str, folder: str, checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """`Start.origin` of a run that starts from a checkpoint of the run in `folder`. `kind` is the key of the folder,
    such as "tuned_from"."""
    return {
        kind: folder,
        "step": checkpoint.step,
        "val_loss": checkpoint.val_loss,
        "state": checkpoint.manifest["state"],
        "training_flops": flops_until(checkpoint, config),
    }


def flops_until(checkpoint: Checkpoint, config: RunConfig) -> int | None:
    """Floating-point operations of training up to a checkpoint of a run, those that the run started from included. None
    where these are not known, as of an imported model."""
    earlier = checkpoint.manifest["context"].get("origin")
    inherited = earlier.get("training_flops", 0) if isinstance(earlier, dict) else 0
    return None if inherited is None else inherited + training_flops(config, checkpoint.step)


class Source(Protocol):
    """A run or a model that another run starts from, opened and checked."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The new run keeps it: the rows of the embedding belong to its ids."""
        ...

    def start(self, programs: Programs, store: TokenStore) -> Start:
        """Read the weights. Raises UserError if they or the text cannot be used."""
        ...


def with_vocabulary_of(model: ModelConfig, store: TokenStore) -> ModelConfig:
    """The model, with the tokenizer's vocabulary size unless the model has a larger one. Raises UserError if the
    model's vocabulary is smaller than the tokenizer's."""
    size = store.tokenizer.vocab_size
    if 0 < model.vocab_size < size:
        raise UserError(
            f"--model.vocab-size {model.vocab_size}: the tokenizer has {size} entries; give at least that, or 0"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or size)
