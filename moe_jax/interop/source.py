"""A verified checkpoint as arrays on the host, without a device and without a compilation.

`experts` and `embedding` give its weights in the conventions of other programs: a projection is [out, in].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.low_rank import LoraShape, merge_named
from moe_jax.runs import manifest
from moe_jax.runs.arrays import ADAPTERS, WEIGHTS
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.load import check_full_weights, find_checkpoint
from moe_jax.runs.records import read_summary


@dataclass(frozen=True)
class ExportSource:
    """What an export is made of."""

    config: RunConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    weights: Mapping[str, np.ndarray]
    """Name in `weights.safetensors` -> array, in the dtype of training. Adapters are merged into the weights."""
    summary: dict[str, Any]

    @property
    def tuned(self) -> bool:
        """Whether the model is fine-tuned on conversations."""
        return self.config.data.format == "chat"

    def block(self, layer: int, name: str) -> np.ndarray:
        """float32: a weight of a block, such as "attention.qkv"."""
        return self.array(f"blocks.{layer}.{name}")

    def array(self, name: str) -> np.ndarray:
        """float32: a weight by its name."""
        return np.asarray(self.weights[name], np.float32)


def open_source(run: Path, step: int | None = None) -> ExportSource:
    """The best checkpoint of a run, or that of a step. Every file of it is compared with its digest.

    Raises the errors of `find_checkpoint`, and UserError if a file is damaged.
    """
    config, tokenizer, checkpoint = find_checkpoint(run, step)
    check_full_weights("--run", run, checkpoint)
    damage = manifest.verify_files(checkpoint.path, checkpoint.manifest)
    if damage:
        raise UserError(f"{checkpoint.path}: {damage}; `uv run python -m moe_jax doctor --run {run}` checks the others")
    return ExportSource(config, tokenizer, checkpoint, _weights(checkpoint.path / WEIGHTS, config), read_summary(run))


def _weights(path: Path, config: RunConfig) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401, teaches numpy bfloat16
    from safetensors.numpy import load_file

    if not path.is_file():
        raise UserError(f"{path}: is missing, and the manifest does not name it; take another checkpoint (--step)")
    arrays, lora = load_file(path), LoraShape.of(config.train)
    if lora is None:
        return arrays
    adapters = {name.removeprefix(ADAPTERS): arrays.pop(name) for name in list(arrays) if name.startswith(ADAPTERS)}
    return merge_named(arrays, adapters, lora.scale, np.matmul)


def experts(source: ExportSource, layer: int, name: str = "ffn.experts") -> list[np.ndarray]:
    """The networks of a layer: gate and up `[E, F, D]`, down `[E, D, F]`. Of `ffn.experts`, or `ffn.shared`. A dense
    baseline has one."""
    return [source.block(layer, f"{name}.{part}").swapaxes(1, 2) for part in ("w_gate", "w_in", "w_out")]


def embedding(source: ExportSource) -> np.ndarray:
    """float32 [V, D]. With an untied head, the factor of a scaled embedding is part of it."""
    model = source.config.model
    table = source.array("embedding")
    return table * np.float32(np.sqrt(model.width)) if model.scaled_embedding and not model.tied_head else table


def balance_bias(source: ExportSource, layer: int) -> np.ndarray:
    """The bias that is added when experts are chosen; zeros if the load is balanced by the loss."""
    model = source.config.model
    if model.routing.balancing == "bias":
        return source.block(layer, "ffn.balance_bias")
    return np.zeros(model.experts, np.float32)
