"""A trained model, opened from the folder of its run."""

from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from moe_jax.config import RunConfig, UserError, load_config
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.model.precision import Policy, choose_policy
from moe_jax.model.transformer import Params, abstract_model
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, restore


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, with its configuration, tokenizer and precision."""

    config: RunConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    policy: Policy
    """The compute precision on this machine."""
    graphdef: nnx.GraphDef
    """The model's static definition: `moe_jax.model.transformer.merge(graphdef, params)` is the model."""
    params: Params


def open_run(path: str | Path, step: int | None = None) -> LoadedRun:
    """Open the run in a folder: its best checkpoint, or the checkpoint of a step.

    Raises UserError where the folder holds no run, or the checkpoint is damaged.
    """
    path = Path(path)
    config = load_config(path)
    if config is None:
        raise UserError(f"--run {path}: no run with a complete checkpoint there; make one with `uv run train.py`")
    store = CheckpointStore(path)
    checkpoint = store.best() if step is None else store.at(step)
    if checkpoint is None:
        raise UserError(f"--run {path}: every checkpoint is damaged; `python -m moe_jax doctor --run {path}` says how")
    policy = choose_policy(config.execution.compute_dtype)
    graphdef, shapes = abstract_model(config.model, policy.compute, config.train.param_dtype, config.execution.remat)
    params = restore(checkpoint, {"params": shapes})["params"]
    return LoadedRun(config, load_tokenizer(path / "tokenizer.json"), checkpoint, policy, graphdef, params)
