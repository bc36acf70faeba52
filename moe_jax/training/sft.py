"""Fine-tuning: a run that starts with the weights and the tokenizer of a trained run, and learns conversations.

The model stays as it is; the data, the loss (`loss.py`: answers only) and the length of the training change. The
optimizer's state and the learning-rate schedule start anew. `config.compatibility.check_tunable` checks the settings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.config import RunConfig
from moe_jax.data.token_store import TokenStore
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.transformer import abstract_model
from moe_jax.runs.load import FoundCheckpoint, check_full_weights, find_checkpoint, restore_weights
from moe_jax.training.programs import Programs
from moe_jax.training.start import Start, origin_of


@dataclass(frozen=True)
class TuningSource:
    """The run that is fine-tuned, at its best checkpoint. Adapters that it has are merged into its weights."""

    folder: str
    run: FoundCheckpoint

    @classmethod
    def open(cls, config: RunConfig) -> "TuningSource | None":
        """The run that `config.base` names, or None if it names none. Raises UserError if it cannot be used."""
        if not config.base:
            return None
        run = find_checkpoint(Path(config.base))
        check_full_weights("--run", Path(config.base), run.checkpoint)
        return cls(config.base, run)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer

    def start(self, programs: Programs, store: TokenStore) -> Start:
        """The parameters of the run, in the dtypes that the new run stores. On a mesh each device reads its parts."""
        del store
        _, shapes = abstract_model(self.run.config.model, param_dtype=self.run.config.train.param_dtype)
        found = restore_weights(self.run.checkpoint, self.run.config, shapes, programs.layout)
        params = jax.tree.map(lambda shape, p: p.astype(shape.dtype), programs.param_shapes, found)
        return Start(params, self.origin(), f"fine-tunes step {self.run.checkpoint.step} of {self.folder}")

    def origin(self) -> dict[str, Any]:
        """The record of the run that the new run saves."""
        return origin_of("tuned_from", self.folder, self.run.checkpoint, self.run.config)
