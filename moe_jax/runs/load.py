"""A trained model, opened from the folder of its run."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.config import RunConfig, UserError, load_config
from moe_jax.config.near_runs import missing_run
from moe_jax.data.token_store import TokenStore, prepare_token_store
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.low_rank import LoraShape, merged
from moe_jax.model.precision import Policy, choose_policy, writing_policy
from moe_jax.model.quantize import quantized_shapes
from moe_jax.model.transformer import Params, abstract_adapted, abstract_model
from moe_jax.parallel.layout import Layout
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, restore
from moe_jax.runs.identity import (
    best_of_run,
    check_same_model,
    check_same_run,
    load_run_tokenizer,
    saved_config,
    saved_weights,
)
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.system.folders import Folder


def restore_weights(checkpoint: Checkpoint, config: RunConfig, shapes: Params, layout: Layout | None = None) -> Params:
    """The parameters of a checkpoint, with the shapes of the plain model. Adapters are merged into them. Of a
    checkpoint that `quantize` made, the matrices are `QuantizedMatrix`. With a `layout`, each device reads its parts.

    Raises the errors of `restore`.
    """
    if weights := saved_weights(checkpoint):
        return restore(checkpoint, {"params": quantized_shapes(shapes, weights)})["params"]
    lora, wanted = LoraShape.of(config.train), {"params": shapes}
    if lora is not None:
        wanted["adapters"] = abstract_adapted(config.model, lora)[1]
    if layout is not None:
        wanted = {kind: layout.placed_shapes(tree) for kind, tree in wanted.items()}
    found = restore(checkpoint, wanted)
    if lora is None:
        return found["params"]
    return merged(found["params"], found["adapters"], lora.scale)


class ValidationText(NamedTuple):
    """The text that a run's configuration names; `store.valid.tokens` is the validation stream."""

    store: TokenStore
    warning: str
    """Not empty if the text has changed since the run was trained: then one line that says so."""


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A trained model, with its configuration, tokenizer and precision."""

    config: RunConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    policy: Policy
    """The compute precision on this machine, for passes over whole texts."""
    graphdef: nnx.GraphDef
    """The model's static definition: `moe_jax.model.transformer.merge(graphdef, params)` is the model."""
    writer: nnx.GraphDef
    """The same for texts that are written token by token. Only its compute precision differs (`writing_policy`)."""
    params: Params
    """Adapters of the run, if it has any, are merged into them."""

    def __repr__(self) -> str:
        """One line for a notebook: the settings and the arrays are its fields."""
        model, size = self.config.model, sum(leaf.size for leaf in jax.tree.leaves(self.params))
        experts = f"{model.experts} experts" if model.dense == "none" else f"dense {model.dense}"
        shape = f"{model.layers} layers of width {model.width}, {experts}, {size:,} parameters"
        return f"<{type(self).__name__} {self.config.run_dir}, step {self.checkpoint.step}: {shape}>"

    def validation_text(self, progress: bool = True) -> ValidationText:
        """The run's validation text, and whether it is still the text of the run. Raises ConfigError or UserError if
        it cannot be read."""
        store = prepare_token_store(self.config.data, tokenizer=self.tokenizer, progress=progress)
        trained = self.checkpoint.manifest["context"].get("data")
        if trained is None or store.is_text_of(trained):
            return ValidationText(store, "")
        warning = (
            f"--data {store.source}: has changed since the run was trained; the numbers are those of another text, "
            "and the model may have been trained on parts of it"
        )
        return ValidationText(store, warning)


class FoundCheckpoint(NamedTuple):
    """A checkpoint that belongs to its run, and what must be known to use it."""

    config: RunConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint


def find_checkpoint(path: Path, step: int | None = None) -> FoundCheckpoint:
    """The best checkpoint of a run, or the checkpoint of a step. No array is read.

    Raises UserError where the folder holds no run, or the checkpoint is damaged or belongs to another run, model or
    tokenizer.
    """
    config = load_config(path)
    if config is None:
        raise UserError(missing_run("--run", path))
    checkpoint = best_of_run(path) if step is None else CheckpointStore(path).at(step)
    if checkpoint is None:
        raise UserError(
            f"--run {path}: every checkpoint is damaged; `uv run python -m moe_jax doctor --run {path}` says how"
        )
    check_same_run(Folder(path), [checkpoint])
    tokenizer = load_run_tokenizer(path, checkpoint, config.model)
    try:
        check_same_model(checkpoint, config)
    except CheckpointCorrupted as error:
        raise CheckpointCorrupted(
            f"{checkpoint.path}: {error}; `uv run python -m moe_jax doctor --run {shlex.quote(str(path))}` checks "
            "the others"
        ) from None
    return FoundCheckpoint(config, tokenizer, checkpoint)


def open_run(path: str | Path, step: int | None = None) -> LoadedRun:
    """Open the run in a folder: its best checkpoint, or the checkpoint of a step. Raises the errors of
    `find_checkpoint`."""
    path = Path(path)
    config, tokenizer, checkpoint = find_checkpoint(path, step)
    asked, trained = config.execution.compute_dtype, saved_config(checkpoint).execution.compute_dtype
    if asked != trained:
        print(
            f"warning: {path / 'config.json'}: execution.compute_dtype is {asked}, and the checkpoint of step "
            f"{checkpoint.step} was trained with {trained}; the numbers may differ in their rounding",
            file=sys.stderr,
        )
    policy = choose_policy(asked)
    stored = config.train.param_dtype, config.execution.remat
    graphdef, shapes = abstract_model(config.model, policy.compute, *stored)
    writer, _ = abstract_model(config.model, writing_policy(asked).compute, *stored)
    params = restore_weights(checkpoint, config, shapes)
    return LoadedRun(config, tokenizer, checkpoint, policy, graphdef, writer, params)
