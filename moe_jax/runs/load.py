"""What a checkpoint belongs to: its model and its tokenizer. And a trained model, opened from its run."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from moe_jax.config import ConfigError, ModelConfig, RunConfig, UserError
from moe_jax.data.token_store import TokenStore, prepare_token_store
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.low_rank import Adapters, LoraShape, merged
from moe_jax.model.precision import Policy, choose_policy, writing_policy
from moe_jax.model.quantized import WEIGHTS, Weights, in_tiles, quantized_shapes
from moe_jax.model.transformer import Forms, Params, abstract_adapted, abstract_model
from moe_jax.parallel.layout import Layout
from moe_jax.parallel.processes import gather_to_host
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.catalog import holds_run, load_config, missing_run
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, doctor_of, restore
from moe_jax.runs.manifest import CheckpointCorrupted


def saved_config(checkpoint: Checkpoint) -> RunConfig:
    """The configuration that a checkpoint was saved with. Raises CheckpointCorrupted if its manifest holds none."""
    try:
        return RunConfig.from_dict(checkpoint.context.get("config"))
    except (UserError, ConfigError) as error:
        raise CheckpointCorrupted(f"{checkpoint.path}: its manifest holds no configuration ({error})") from None


def saved_weights(checkpoint: Checkpoint) -> Weights | None:
    """The form of the weights if `quantize` made the checkpoint, else None. Raises CheckpointCorrupted for a form that
    this program does not know."""
    made = checkpoint.context.get("quantized")
    if made is None:
        return None
    for weights in WEIGHTS:
        if isinstance(made, dict) and made.get("weights") == weights:
            return weights
    raise CheckpointCorrupted("its manifest names a form of weights that this program does not know")


def check_full_weights(flag: str, path: Path, checkpoint: Checkpoint) -> None:
    """Raise UserError if `quantize` made the checkpoint: it has no weights that can be trained or exported."""
    if weights := saved_weights(checkpoint):
        source = checkpoint.context["quantized"].get("made_from")
        raise UserError(f"{flag} {path}: its weights are {weights}; name the run that they were made of, {source}")


def load_run_tokenizer(run: Path, checkpoint: Checkpoint | None, model: ModelConfig) -> Tokenizer:
    """The tokenizer of a run. Raises UserError if it cannot be read, is not the one that the checkpoint names, or has
    token ids that the model does not know."""
    path = run / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    expected = checkpoint.context.get("tokenizer") if checkpoint else None
    if expected not in (None, tokenizer.digest):
        raise UserError(f"{path}: is not the tokenizer that the run was trained with; put that file back")
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} entries, and the model of the run knows {model.vocab_size}; put the "
            "tokenizer of the run back"
        )
    return tokenizer


def restore_weights(
    checkpoint: Checkpoint,
    config: RunConfig,
    shapes: Params,
    layout: Layout | None = None,
    merge: Callable[[Params, Adapters, float], Params] = merged,
) -> Params:
    """The parameters of a checkpoint, with the shapes of the plain model. `merge` adds adapters to them. Of a
    checkpoint that `quantize` made, the matrices are `QuantizedMatrix`. With a `layout`, each device reads its parts.

    Every command that opens a trained model reads its weights here. Raises the errors of `restore`, and
    CheckpointCorrupted if a weight is not finite.
    """
    weights, lora = saved_weights(checkpoint), LoraShape.of(config.train)
    wanted = {"params": quantized_shapes(shapes, weights) if weights else shapes}
    if lora is not None:
        wanted["adapters"] = abstract_adapted(config.model, lora)[1]
    if layout is not None:
        wanted = {kind: layout.placed_shapes(tree) for kind, tree in wanted.items()}
    restored = restore(checkpoint, wanted)
    for name, leaf in named_leaves(restored).items():
        if leaf.dtype.kind not in "iu" and not np.isfinite(gather_to_host(leaf)).all():
            raise CheckpointCorrupted(f"{checkpoint.path}: {name} has NaN or infinite values; name another --step")
    if lora is not None:
        return merge(restored["params"], restored["adapters"], lora.scale)
    return restored["params"] if layout else in_tiles(restored["params"])


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

    @property
    def converses(self) -> bool:
        """Whether the model has learned conversations: by `sft`, or before it was imported, with a chat template."""
        return self.config.data.format == "chat" or self.tokenizer.template is not None

    def __repr__(self) -> str:
        """One line for a notebook: the settings and the arrays are its fields."""
        model, size = self.config.model, totals(count_parameters(self.config.model)).total
        experts = f"{model.experts} experts" if model.dense == "none" else f"dense {model.dense}"
        shape = f"{model.layers} layers of width {model.width}, {experts}, {size:,} parameters"
        return f"<{type(self).__name__} {self.config.run_dir}, step {self.checkpoint.step}: {shape}>"

    def validation_text(self, progress: bool = True) -> tuple[TokenStore, str]:
        """The text that the run's configuration names, and one line that warns if it has changed since the run was
        trained, else "". Raises UserError if it cannot be read."""
        try:
            store = prepare_token_store(self.config.data, tokenizer=self.tokenizer, progress=progress)
        except ConfigError as error:
            raise UserError(f"the run's validation text is not at hand ({error}); give a text to score") from None
        trained = self.checkpoint.context.get("data")
        if trained in (None, store.digest):
            return store, ""
        changed = "has changed since the run was trained; the numbers are those of another text, and the model may "
        return store, f"--data {store.source}: {changed}have been trained on parts of it"


class FoundCheckpoint(NamedTuple):
    """A checkpoint that belongs to its run, and what must be known to use it."""

    config: RunConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint


def find_checkpoint(path: Path, step: int | None = None, flag: str = "--run") -> FoundCheckpoint:
    """The best checkpoint of a run, or the checkpoint of a step. No array is read. The configuration is that of the
    checkpoint's manifest, which has a digest. Only the path of the text is that of config.json.

    Raises UserError where the folder holds no run, or the checkpoint is damaged or belongs to another tokenizer.
    """
    if not holds_run(path):
        raise UserError(missing_run(flag, path))
    store = CheckpointStore(path)
    checkpoint = store.best() if step is None else store.at(step)
    if checkpoint is None:
        raise UserError(f"{flag} {path}: every checkpoint is damaged; {doctor_of(path)} says how")
    config, newest = saved_config(checkpoint), load_config(path)
    if newest is not None:  # the text may have moved since this checkpoint was saved
        config = config.override({("data", "source"): newest.data.source})
    return FoundCheckpoint(config, load_run_tokenizer(path, checkpoint, config.model), checkpoint)


def open_run(path: str | Path, step: int | None = None, flag: str = "--run") -> LoadedRun:
    """Open the run in a folder: its best checkpoint, or the checkpoint of a step. Raises the errors of
    `find_checkpoint`."""
    path = Path(path)
    config, tokenizer, checkpoint = find_checkpoint(path, step, flag)
    policy, graphdef, writer, shapes = _definitions(config)
    params = restore_weights(checkpoint, config, shapes)
    return LoadedRun(config, tokenizer, checkpoint, policy, graphdef, writer, params)


def _definitions(config: RunConfig) -> tuple[Policy, nnx.GraphDef, nnx.GraphDef, Params]:
    """The precision, the model that reads, the model that writes, and the shapes of their parameters."""
    dtype = config.execution.compute_dtype
    policy, remat = choose_policy(dtype), config.execution.remat
    graphdef, shapes = abstract_model(config.model, Forms(policy.compute, remat), config.train.param_dtype)
    writer, _ = abstract_model(config.model, Forms(writing_policy(dtype).compute, remat))
    return policy, graphdef, writer, shapes


def with_fewer_experts(run: LoadedRun, top_k: int) -> LoadedRun:
    """The run with `top_k` experts for a token in place of those it was trained with: faster, but less accurate. The
    gates are renormalised over the chosen ones where the model does so.

    Raises ConfigError for more than the trained number, or a dense model.
    """
    trained = run.config.model.routing.top_k
    if run.config.model.dense != "none" or not 1 <= top_k <= trained:
        most = "a dense model has no experts" if run.config.model.dense != "none" else f"must be from 1 to {trained}"
        raise ConfigError(f"--active {top_k}: {most}")
    config = dataclasses.replace(run.config, model=run.config.model.with_routing(top_k=top_k))
    _, graphdef, writer, _ = _definitions(config)
    return dataclasses.replace(run, config=config, graphdef=graphdef, writer=writer)
