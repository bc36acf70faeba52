"""A verified checkpoint as arrays on the host.

`experts` and `embedding` give its weights in the conventions of other programs: a projection is [out, in].
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import RunConfig
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.low_rank import Adapters, merge_named
from moe_jax.model.transformer import Params, abstract_model
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.load import check_full_weights, find_checkpoint, restore_weights
from moe_jax.runs.records import read_summary


@dataclass(frozen=True)
class ExportSource:
    """What an export is made of."""

    config: RunConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    weights: Mapping[str, np.ndarray]
    """Name of a parameter -> array, in the dtype of training. Adapters are merged into the weights."""
    summary: dict[str, Any]

    @property
    def tuned(self) -> bool:
        """Whether the model is fine-tuned on conversations."""
        return self.config.data.format == "chat"

    def hollow(self) -> "ExportSource":
        """The same source, whose weights are zeros that take no memory. Tensors made of it have the right shapes."""
        zeros = {name: np.broadcast_to(np.float32(0), weight.shape) for name, weight in self.weights.items()}
        return dataclasses.replace(self, weights=zeros)

    def array(self, name: str, place: Any = ...) -> np.ndarray:
        """float32: a weight by its name, or the part of it at an index."""
        return np.asarray(self.weights[name][place], np.float32)


def open_source(run: Path, step: int | None = None) -> ExportSource:
    """The best checkpoint of a run, or that of a step. Raises the errors of `find_checkpoint` and `restore_weights`."""
    config, tokenizer, checkpoint = find_checkpoint(run, step)
    check_full_weights("--run", run, checkpoint)
    _, shapes = abstract_model(config.model, param_dtype=config.train.param_dtype)
    params = restore_weights(checkpoint, config, shapes, merge=_merged_by_numpy)
    return ExportSource(config, tokenizer, checkpoint, _on_host(params), read_summary(run))


def _merged_by_numpy(params: Params, adapters: Adapters, scale: float) -> Params:
    """By name. XLA rounds products and sums together, so it would give other bits."""
    return merge_named(_on_host(params), _on_host(adapters), scale, np.matmul)


def _on_host(tree: Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def experts(source: ExportSource, layer: int, name: str = "experts") -> list[np.ndarray]:
    """The networks of a layer: gate and up `[E, F, D]`, down `[E, D, F]`. A dense baseline has one. With the name
    "shared", the shared experts as one."""
    parts = (f"blocks.{layer}.ffn.{name}.{part}" for part in ("w_gate", "w_in", "w_out"))
    return [source.array(part).swapaxes(1, 2) for part in parts]


def embedding(source: ExportSource) -> np.ndarray:
    """float32 [V, D]. With an untied head, the factor of a scaled embedding is part of it."""
    model = source.config.model
    table = source.array("embedding")
    return table * np.float32(np.sqrt(model.width)) if model.scaled_embedding and not model.tied_head else table


def balance_bias(source: ExportSource, layer: int) -> np.ndarray:
    """The bias that is added when experts are chosen; zeros if the load is balanced by the loss."""
    model = source.config.model
    if model.routing.balancing == "bias":
        return source.array(f"blocks.{layer}.ffn.balance_bias")
    return np.zeros(model.experts, np.float32)
