"""Sparse upcycling (Komatsuzaki et al. 2023, section 3): a mixture of experts that starts from a trained dense run.

Every expert is a copy of the dense FFN, the router is random, and everything else is taken over. The gates of the K
experts that a token is sent to sum to 1, so at step 0, where nothing is dropped, the model computes what the dense one
does. The copies part because the router sends them different tokens. `compatibility.check_upcyclable` says which
settings that takes. The optimizer and its schedule start anew; from step 0 on it is an ordinary run.

The run keeps the dense run's tokenizer, whose rows the embedding holds, and its text, so that what validates has been
trained on by neither.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.analysis.accounting import training_flops
from moe_jax.compatibility import check_upcyclable, dense_run
from moe_jax.config import RunConfig, UserError
from moe_jax.data.token_store import TokenStore
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.model.transformer import Params
from moe_jax.training.checkpoint import Checkpoint, CheckpointStore, named_leaves, restore
from moe_jax.training.run import RunFolder, abstract_model


@dataclass(frozen=True)
class DenseStart:
    """The dense run that a new run begins from: its best checkpoint."""

    config: RunConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @classmethod
    def open(cls, config: RunConfig) -> "DenseStart | None":
        """The run that `config.upcycle` names; None where it names none. Raises ConfigError, UserError."""
        if not config.upcycle:
            return None
        dense, folder = dense_run(config.upcycle), Path(config.upcycle)
        check_upcyclable(dense, config)
        checkpoint = CheckpointStore(folder).best()
        if checkpoint is None:
            raise UserError(f"--upcycle {folder}: every checkpoint is damaged; `python -m moe_jax doctor` says how")
        return cls(dense, checkpoint, load_tokenizer(RunFolder(folder).tokenizer))

    def params(self, fresh: Params, store: TokenStore) -> Params:
        """The first parameters of the new run: see `copied`. Raises UserError where its text is another one."""
        if self.checkpoint.manifest["context"].get("data") != store.digest:
            raise UserError(
                f"--data {store.source}: not the text that the run in --upcycle was trained on, "
                "whose validation text must stay unseen; leave the flag out, or name that text"
            )
        _, shapes = abstract_model(self.config, "float32")
        return copied(fresh, restore(self.checkpoint, {"params": shapes})["params"])

    def origin(self, folder: str) -> dict[str, Any]:
        """What is remembered of it: `training_flops` are those that the dense run had taken by then."""
        return {
            "upcycled_from": folder,
            "step": self.checkpoint.step,
            "val_loss": self.checkpoint.val_loss,
            "state": self.checkpoint.manifest["state"],
            "training_flops": training_flops(self.config, self.checkpoint.step),
        }


def copied(fresh: Params, dense: Params) -> Params:
    """`fresh` parameters of a mixture of experts with those of a dense model in their place: the one FFN `[1, D, F]`
    in all E experts, the rest as it is. What the dense model lacks, the routers, stays fresh."""
    there = named_leaves(dense)

    def fill(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith((".router", ".balance_bias")):
            return leaf
        old = there.pop(name)
        return jnp.repeat(old, leaf.shape[0] // old.shape[0], axis=0).astype(leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(fill, fresh)
    assert not there, f"the dense model has more: {sorted(there)}"
    return filled
