"""What a checkpoint belongs to: its run, its model, its tokenizer.

A run has an id, drawn at its start. config.json, the manifest of each checkpoint (`context.run_id`) and the lock hold
it. A checkpoint that was copied from another run has another id. Runs of earlier versions have no id.
"""

import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_jax.config import ConfigError, ModelConfig, RunConfig, UserError
from moe_jax.config.compatibility import ROUTING_OF_MESH
from moe_jax.config.flags import flag_of
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.model.quantize import WEIGHTS, Weights
from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.system.folders import Folder


def new_run_id() -> str:
    """A random id. It decides nothing else about the run."""
    return secrets.token_hex(8)


def read_run_id(run: Folder) -> str | None:
    """The run's id in config.json. None if there is no usable one there."""
    try:
        return _usable(run.read_json("config.json").get("run_id"))
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _usable(run_id: Any) -> str | None:
    return run_id if isinstance(run_id, str) and re.fullmatch("[0-9a-f]{16}", run_id) else None


def checkpoint_run_id(checkpoint: Checkpoint) -> str | None:
    """The id of the run that saved a checkpoint. None if an earlier version saved it."""
    return _usable(checkpoint.manifest["context"].get("run_id"))


def kept_precision(checkpoint: Checkpoint) -> str:
    """The compute precision of the process that saved a checkpoint. "" if an earlier version saved it."""
    found = checkpoint.manifest["context"].get("compute_dtype")
    return found if isinstance(found, str) else ""


def check_same_run(run: Folder, checkpoints: Iterable[Checkpoint]) -> str | None:
    """The id of the folder's run, or None if it has none.

    `checkpoints` are oldest first. Raises UserError if one of them belongs to another run. Without an id in
    config.json, the oldest checkpoint says which run it is.
    """
    found = [(checkpoint, checkpoint_run_id(checkpoint)) for checkpoint in checkpoints]
    written = read_run_id(run)
    expected = written or (found[0][1] if found else None)
    allowed = {expected, None} if written else {expected}  # a run of an earlier version gets its id at a resume
    for checkpoint, run_id in found:
        if run_id not in allowed:
            raise UserError(
                f"{checkpoint.path}: was saved by another run ({run_id or 'without an id'}) than the run of this "
                f"folder ({expected or 'without an id'}); move it out of the folder"
            )
    return expected


def best_of_run(run: Path) -> Checkpoint | None:
    """The best good checkpoint in a run's folder, or None if none is good.

    Raises UserError if any checkpoint there belongs to another run: it may have taken the place of the best one.
    """
    store = CheckpointStore(run)
    check_same_run(Folder(run), store.list())
    return store.best()


def saved_config(checkpoint: Checkpoint) -> RunConfig:
    """The configuration that a checkpoint was saved with. Raises CheckpointCorrupted if its manifest holds none."""
    try:
        return RunConfig.from_dict(checkpoint.manifest["context"].get("config"))
    except (UserError, ConfigError):
        raise CheckpointCorrupted("its manifest does not say what it belongs to") from None


def check_same_model(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Check that a checkpoint belongs to the model of a configuration, before anything of the model's size is built.

    Raises UserError if it does not, and CheckpointCorrupted if its manifest does not say, or contradicts itself.
    """
    there, here = saved_config(checkpoint).to_dict(), config.to_dict()
    for section in ("model", "routing"):
        for name, value in here[section].items():
            if name != ROUTING_OF_MESH and there[section][name] != value:
                raise UserError(
                    f"{flag_of(section, name)} {value}: {checkpoint.path} was saved with {there[section][name]}; "
                    "give it that value in config.json, or start a new run with another --out"
                )
    leaves = manifest.leaves_of(checkpoint.manifest)
    layers = {name.split(".")[2] for name in leaves if name.startswith("params.blocks.")}
    if len(layers) != config.model.layers or _embedding_shape(leaves) != (config.model.vocab_size, config.model.width):
        raise CheckpointCorrupted("its arrays are not those of the model that its manifest names")


def _embedding_shape(leaves: dict[str, manifest.Leaf]) -> tuple[int, ...] | None:
    """(V, D). A quantised embedding is saved as `[D, V]`, in int4 with two codes a byte."""
    if plain := leaves.get("params.embedding"):
        return plain.shape
    codes = leaves.get("params.embedding.codes")
    if codes is None or len(codes.shape) != 2:
        return None
    return codes.shape[1], codes.shape[0] * (1 if codes.dtype == "int8" else 2)


def saved_weights(checkpoint: Checkpoint) -> Weights | None:
    """The form of the weights if `quantize` made the checkpoint, else None. Raises CheckpointCorrupted for a form that
    this program does not know."""
    made = checkpoint.manifest["context"].get("quantized")
    if made is None:
        return None
    for weights in WEIGHTS:
        if isinstance(made, dict) and made.get("weights") == weights:
            return weights
    raise CheckpointCorrupted("its manifest names a form of weights that this program does not know")


def check_full_weights(flag: str, path: Path, checkpoint: Checkpoint) -> None:
    """Raise UserError if `quantize` made the checkpoint: it has no weights that can be trained or exported."""
    if weights := saved_weights(checkpoint):
        source = checkpoint.manifest["context"]["quantized"].get("made_from")
        raise UserError(f"{flag} {path}: its weights are {weights}; name the run that they were made of, {source}")


def load_run_tokenizer(run: Path, checkpoint: Checkpoint | None, model: ModelConfig) -> Tokenizer:
    """The tokenizer of a run. Raises UserError if it cannot be read, is not the one that the checkpoint names, or has
    token ids that the model does not know."""
    path = run / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    expected = checkpoint.manifest["context"].get("tokenizer") if checkpoint else None
    if expected not in (None, tokenizer.digest):
        raise UserError(
            f"{path}: is not the tokenizer that the run was trained with; put that file back, or try "
            f"`uv run python -m moe_jax doctor --run {run} --repair`"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} entries, and the model of the run knows {model.vocab_size}; put the "
            "tokenizer of the run back"
        )
    return tokenizer
