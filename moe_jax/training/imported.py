"""A run that starts from a Hugging Face model: with --init-from as it is, with --upcycle as a mixture of experts.

The optimizer's state and the learning-rate schedule start anew.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from moe_jax.config import RunConfig
from moe_jax.data.token_store import TokenStore
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.starting_point import starting_point
from moe_jax.model.moe.layer import ROUTER_SCALE
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.programs import Programs
from moe_jax.training.start import Start


@dataclass(frozen=True)
class ImportSource:
    """The model of a folder, checked and not yet read."""

    found: Pretrained
    upcycled: bool

    @classmethod
    def open(cls, config: RunConfig) -> "ImportSource | None":
        """The model that `config.init_from` or `config.upcycle` names, or None if that is no Hugging Face folder.

        Raises ConfigError or UserError if it cannot be used.
        """
        point = starting_point(config)
        if point is None or point.shape is None:
            return None
        point.check(config)
        flag = "--init-from" if config.init_from else "--upcycle"
        return cls(Pretrained.open(Path(config.init_from or config.upcycle), flag), not config.init_from)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.found.tokenizer

    def start(self, programs: Programs, store: TokenStore) -> Start:
        """Read the weights into their places. Raises UserError if a value is not finite."""
        folder, name = self.found.shape.folder, self.found.shape.architecture.model_type
        fresh = dict(_fresh_leaves(programs)) if self.upcycled else None
        params, digest = self.found.params(programs.state_shapes.params, fresh)
        done = "upcycled_from" if self.upcycled else "initialised_from"
        origin = {done: str(folder), "model_type": name, "digest": digest, "training_flops": None}
        how = "every expert is a copy of its network" if self.upcycled else f"digest {digest}"
        return Start(params, origin, f"started from the {name} model in {folder}; {how}")


def _fresh_leaves(programs: Programs) -> Iterator[tuple[str, jax.Array]]:
    """(dotted name, value) of what a dense model does not have: routers, and biases that balance the load.

    Only these are drawn. A whole random model beside the imported one would take its memory twice.
    """
    key = purpose_key(programs.config.train.seed, Purpose.INITIAL_PARAMETERS)
    for layer, block in enumerate(programs.param_shapes["blocks"].values()):
        router = block["ffn"]["router"]
        values = jax.random.normal(jax.random.fold_in(key, layer), router.shape)
        scaled = values * (ROUTER_SCALE / math.sqrt(router.shape[0]))
        yield f"blocks.{layer}.ffn.router", scaled.astype(router.dtype)
        if "balance_bias" in block["ffn"]:
            yield f"blocks.{layer}.ffn.balance_bias", jnp.zeros_like(block["ffn"]["balance_bias"])
