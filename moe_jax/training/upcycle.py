"""Sparse upcycling (Komatsuzaki et al. 2023, section 3): a mixture of experts that starts from a trained dense run.

Every expert starts as a copy of the dense feed-forward network. The router starts at random. All other parameters are
copied. The gates of a token's K experts sum to 1. So at step 0 the model computes the same function as the dense model,
as long as nothing is dropped. The copies become different because the router sends them different tokens.
Until they are, the task gives the router no gradient, if K > 1 and nothing is dropped: chapter 14 of `foundation`.
`config.compatibility.check_upcyclable` checks the settings that this needs. The optimizer's state and the learning-rate
schedule start anew.

The run keeps the tokenizer of the dense run, because the rows of the embedding belong to its ids. It also keeps the
text of the dense run, so that neither run has trained on the validation text.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import RunConfig, UserError
from moe_jax.config.compatibility import check_upcyclable, load_dense_config
from moe_jax.data.token_store import TokenStore
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.transformer import Params, abstract_model
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.load import best_of_run, check_full_weights, check_same_model, load_run_tokenizer, restore_weights
from moe_jax.training.programs import Programs
from moe_jax.training.start import Start, origin_of


@dataclass(frozen=True)
class UpcycleSource:
    """The dense run that a new run starts from, at its best checkpoint."""

    folder: str
    config: RunConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @classmethod
    def open(cls, config: RunConfig) -> "UpcycleSource | None":
        """The dense run that `config.upcycle` names, or None if it names none. Raises ConfigError or UserError if it
        cannot be used."""
        if not config.upcycle:
            return None
        dense, folder = load_dense_config(config.upcycle), Path(config.upcycle)
        check_upcyclable(dense, config)
        checkpoint = best_of_run(folder)
        if checkpoint is None:
            raise UserError(
                f"--upcycle {folder}: every checkpoint is damaged; "
                f"`uv run python -m moe_jax doctor --run {shlex.quote(str(folder))}` says how"
            )
        check_full_weights("--upcycle", folder, checkpoint)
        check_same_model(checkpoint, dense)
        return cls(config.upcycle, dense, checkpoint, load_run_tokenizer(folder, checkpoint, dense.model))

    def start(self, programs: Programs, store: TokenStore) -> Start:
        """The initial parameters of the new run. Raises UserError if the new run has another text."""
        note = f"upcycled from step {self.checkpoint.step} of {self.folder}"
        return Start(self.params(programs, store), self.origin(), note)

    def params(self, programs: Programs, store: TokenStore) -> Params:
        """The initial parameters of the new run (see `copy_dense_params`). On a mesh each device reads its parts of the
        dense model, and fills its own parts of the new one. Raises UserError if the new run has another text."""
        if not store.is_text_of(self.checkpoint.manifest["context"].get("data")):
            raise UserError(
                f"--data {store.source}: not the text that the run in --upcycle was trained on, "
                "whose validation text must stay unseen; leave the flag out, or name that text"
            )
        _, shapes = abstract_model(self.config.model, param_dtype=self.config.train.param_dtype)
        dense = restore_weights(self.checkpoint, self.config, shapes, programs.layout)
        if programs.layout is None:
            return copy_dense_params(programs.initial_params(), dense)
        copy = jax.jit(copy_dense_params, donate_argnums=0, out_shardings=programs.param_places)
        return copy(programs.initial_params(), dense)

    def origin(self) -> dict[str, Any]:
        """The record of the dense run that the new run saves."""
        return origin_of("upcycled_from", self.folder, self.checkpoint, self.config)


def copy_dense_params(fresh: Params, dense: Params) -> Params:
    """The parameters of a dense model, arranged as the `fresh` parameters of an MoE model.

    The dense network `[1, D, F]` is copied into all E experts. Other parameters are copied unchanged. Routers and
    balance biases, which the dense model does not have, keep their fresh values.
    """
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
