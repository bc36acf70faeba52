"""The weights of a new run that does not start from noise: those of a run, or of a Hugging Face model.

The optimizer's state and the learning-rate schedule start anew. The run keeps the tokenizer that the weights belong to,
because the rows of the embedding belong to its ids.

Sparse upcycling (Komatsuzaki et al. 2023, section 3): every expert starts as a copy of the dense feed-forward network,
the router starts at random, and all other parameters are copied. The gates of a token's K experts sum to 1. So at step
0 the model computes the same function as the dense model, as long as nothing is dropped. The copies become different
because the router sends them different tokens. Until they are, the task gives the router no gradient, if K > 1 and
nothing is dropped: chapter 14 of `foundation`. `training/start.py` checks the settings that this needs.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import RunConfig, UserError
from moe_jax.data.token_store import TokenStore
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.interop.pretrained import Pretrained
from moe_jax.model.costs import training_flops
from moe_jax.model.moe.layer import ROUTER_SCALE
from moe_jax.model.quantized import dequantize
from moe_jax.model.transformer import Params, abstract_model
from moe_jax.parallel.layout import leaf_name
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.checkpoint import Checkpoint
from moe_jax.runs.load import check_full_weights, find_checkpoint, restore_weights, saved_weights
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.programs import Programs


class Initial(NamedTuple):
    """What a run starts with that does not start from noise."""

    params: Params
    origin: dict[str, Any]
    """The record of it in config.json and in the checkpoints. `training_flops` is what it took to train, None if that
    is not known."""
    note: str
    """One line for the user."""


class InitialWeights(NamedTuple):
    """Weights that are checked, and not yet read."""

    tokenizer: Tokenizer
    read: Callable[[Programs, TokenStore], Initial]
    """(programs, store) -> what the run starts with, in the dtypes and at the places of the programs. Raises UserError
    if the weights or the text cannot be used."""


def of_run(flag: str, folder: str) -> InitialWeights:
    """The best checkpoint of the run in `folder`. For fine-tuning (--run) the whole model: adapters are merged into
    its weights, and quantised weights become the values that they stand for. For --upcycle a dense model, whose network
    every expert starts as."""
    path, upcycled = Path(folder), flag == "--upcycle"
    config, tokenizer, checkpoint = find_checkpoint(path, flag=flag)
    quantised = saved_weights(checkpoint)
    if upcycled or checkpoint.step == 0:  # an imported model may be far larger in float32: --init-from reads its folder
        check_full_weights(flag, path, checkpoint)

    def read(programs: Programs, store: TokenStore) -> Initial:
        if upcycled and checkpoint.context.get("data") != store.digest:
            raise UserError(
                f"--data {store.source}: not the text that the run in --upcycle was trained on, "
                "whose validation text must stay unseen; leave the flag out, or name that text"
            )
        _, shapes = abstract_model(config.model, param_dtype=config.train.param_dtype)
        params = restore_weights(checkpoint, config, shapes, None if quantised else programs.layout)
        origin = _origin("upcycled_from" if upcycled else "tuned_from", folder, checkpoint, config)
        if not upcycled:
            params = dequantize(params, programs.param_shapes)
            if quantised and programs.layout is not None:
                params = jax.device_put(params, programs.param_places)
            note = f"fine-tunes step {checkpoint.step} of {folder}"
            return Initial(params, origin, f"{note}, from its {quantised} weights" if quantised else note)
        copy = copy_dense_params
        if programs.layout is not None:  # each device fills its own parts
            copy = jax.jit(copy_dense_params, donate_argnums=0, out_shardings=programs.param_places)
        return Initial(
            copy(programs.initial_params(), params), origin, f"upcycled from step {checkpoint.step} of {folder}"
        )

    return InitialWeights(tokenizer, read)


def of_pretrained(flag: str, folder: str) -> InitialWeights:
    """The model of a Hugging Face folder: as it is with the flag --init-from, as experts with --upcycle."""
    model, upcycled = Pretrained.open(Path(folder), flag), flag == "--upcycle"
    path, name = model.shape.folder, model.shape.architecture.model_type

    def read(programs: Programs, store: TokenStore) -> Initial:
        del store
        fresh = dict(_fresh_leaves(programs)) if upcycled else None
        params, digest = model.params(programs.state_shapes.params, fresh)
        kind = "upcycled_from" if upcycled else "initialised_from"
        origin = {kind: str(path), "model_type": name, "digest": digest, "training_flops": None}
        how = "every expert is a copy of its network" if upcycled else f"digest {digest}"
        return Initial(params, origin, f"started from the {name} model in {path}; {how}")

    return InitialWeights(model.tokenizer, read)


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


def copy_dense_params(fresh: Params, dense: Params) -> Params:
    """The parameters of a dense model, arranged as the `fresh` parameters of an MoE model.

    The dense network `[1, D, F]` is copied into all E experts. Other parameters are copied unchanged. Routers and
    balance biases, which the dense model does not have, keep their fresh values.
    """
    leaves = named_leaves(dense)

    def fill(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        name = leaf_name(path)
        if name.endswith((".router", ".balance_bias")):
            return leaf
        old = leaves.pop(name)
        return jnp.repeat(old, leaf.shape[0] // old.shape[0], axis=0).astype(leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(fill, fresh)
    assert not leaves, f"the dense model has more: {sorted(leaves)}"
    return filled


def _origin(kind: str, folder: str, checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """`Initial.origin` of a run that starts from a checkpoint of the run in `folder`. `kind` is the key of the folder,
    such as "tuned_from".

    `training_flops` are the operations of training up to the checkpoint, with those of the run that it started from.
    None where these are not known, as for an imported model.
    """
    earlier = checkpoint.context.get("origin")
    inherited = earlier.get("training_flops", 0) if isinstance(earlier, dict) else 0
    return {
        kind: folder,
        "step": checkpoint.step,
        "val_loss": checkpoint.val_loss,
        "weights_digest": checkpoint.weights_digest,
        "training_flops": None if inherited is None else inherited + training_flops(config, checkpoint.step),
    }
