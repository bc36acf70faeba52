"""The weights and the settings of a run, under the names of `transformer.py`."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from foundation.positions import ROPE_BASE, slowed_pairs
from foundation.trained import Problem
from foundation.transformer import ModelConfig

SHAPES = {
    *("vocab_size", "width", "kv_heads", "head_size", "expert_hidden", "shared_experts", "shared_gate"),
    *("activation", "bias", "qkv_bias", "qk_norm"),
}
"""Settings that the arrays show by their names and shapes."""
READ = {
    *("seq_len", "layers", "heads", "experts", "dense", "norm", "norm_eps", "positions", "rope_theta", "rope_scaling"),
    *("tied_head", "scaled_embedding", "routing", "top_k", "renormalise_gates", "balancing"),
}
"""Settings that this package computes with. `config_of` refuses the values that it has not derived."""
MULTIPLIERS = {"embedding_multiplier": 1, "attention_multiplier": 0, "residual_multiplier": 1, "logits_scaling": 1}
"""Granite's factors, with the values that change nothing. No other has been derived."""
ONLY_TRAINING = {
    *("tie_value_output_init", "zero_init_residual", "dropout", "attention_dropout"),
    *("capacity_factor", "device_capacity_factor", "dispatch"),
}
"""Settings of the start, of random numbers and of dropping. The loss of evaluation does not depend on them."""
EARLIER = {"priority", "logit_noise", "input_jitter", "eval_capacity_factor"}
"""Settings that only runs of earlier versions have. The first three concern training only."""


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every array of the file, in float64.

    Raises Problem where the file is missing, is no whole safetensors file, or holds quantised weights.
    """
    try:
        with safe_open(path, "flax") as file:  # "numpy" does not know bfloat16
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); give the folder of a finished run") from None
    except SafetensorError as error:
        raise Problem(f"{path}: damaged ({error}); take it from the run again") from None
    if any(array.dtype.kind in "iu" for array in arrays.values()):
        raise Problem(f"{path}: has quantised weights; name the run that they were made of")
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def config_of(model: dict[str, Any], routing: dict[str, Any]) -> ModelConfig:
    """What the shapes of the parameters do not say, from `config.json`. Evaluation drops nothing, so each expert has a
    slot for every token: a capacity factor of E / K.

    Raises Problem for what this package has not derived, and for every setting that it does not know.
    """
    unknown = sorted({*model, *routing} - SHAPES - READ - MULTIPLIERS.keys() - ONLY_TRAINING - EARLIER)
    if unknown:
        raise Problem(
            f"config.json sets {', '.join(unknown)}, which foundation does not know, so it could compute another "
            "model; choose a run without it, or name the setting in foundation/trained/weights.py"
        )
    if any(model.get(name, plain) != plain for name, plain in MULTIPLIERS.items()):
        raise Problem("the run has Granite's multipliers, which are not derived; choose another run")
    if routing.get("balancing", "loss") != "loss":
        raise Problem("the run balances by a bias, which is not derived; train with --routing.balancing loss")
    if routing.get("eval_capacity_factor", 0.0) > 0:
        raise Problem("the run drops tokens in evaluation, which is not the loss of all tokens; choose another run")
    dense = model.get("dense", "none") != "none"
    experts, top_k = (1, 1) if dense else (model["experts"], routing["top_k"])
    return ModelConfig(
        heads=model["heads"],
        top_k=top_k,
        capacity_factor=float(experts),
        norm=model["norm"],
        norm_eps=model.get("norm_eps") or None,
        rotary=model["positions"] == "rope",
        rope_base=model.get("rope_theta", ROPE_BASE),
        rope_slowed=_slowed(model),
        renormalise_gates=routing.get("renormalise_gates", True),
    )


def _slowed(model: dict[str, Any]) -> tuple[float, ...]:
    """The factor of each pair's frequency (chapter 6). Raises Problem for a rotation that scales the scores too."""
    scaling = json.loads(model.get("rope_scaling") or "{}")
    if not scaling:
        return (1.0,)
    if scaling["rope_type"] == "linear":
        return (1.0 / scaling["factor"],)
    if scaling["rope_type"] != "llama3":
        kind = f"the run has a rotation of kind {scaling['rope_type']}, which foundation has not derived"
        raise Problem(f"{kind}; choose a run with the kind linear or llama3, or with none")
    width = model.get("head_size") or model["width"] // model["heads"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained, base = scaling["original_max_position_embeddings"], model.get("rope_theta", ROPE_BASE)
    return tuple(map(float, slowed_pairs(width, scaling["factor"], trained, base, low, high)))


def parameters_of(arrays: dict[str, np.ndarray], model: dict[str, Any]) -> dict:
    """The arrays as the tree that `transformer.model_forward` takes.

    A dense network is one expert that every token goes to: the softmax over one logit is 1. An embedding that is scaled
    by sqrt(D) is a table that is.
    """
    tree: dict = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = jnp.asarray(array)
    try:
        scale = model["width"] ** 0.5 if model.get("scaled_embedding") else 1.0
        params = {"embedding": tree["embedding"] * scale, "norm": tree["norm"]}
        params["blocks"] = [block_of(tree["blocks"][str(i)]) for i in range(model["layers"])]
        if "position" in tree:
            params["positions"] = tree["position"]
        if not model["tied_head"]:
            params["head"] = tree["head"]
        elif scale != 1.0:
            params["head"] = tree["embedding"].T  # the table without the scale
    except KeyError as error:
        raise Problem(f"the weights have no {error}, which config.json asks for; take both from one run") from None
    return params


def block_of(block: dict) -> dict:
    """The arrays of one block, renamed."""
    given, ffn = block["attention"], block["ffn"]
    attention: dict = {name: given[name] for name in ("query_norm", "key_norm") if name in given}
    for name in ("qkv", "out"):
        bias = f"{name}_bias"
        attention[name] = {"kernel": given[name]} | ({"bias": given[bias]} if bias in given else {})
    no_choice = jnp.zeros((ffn["experts"]["w_in"].shape[1], 1))
    moe = {"router": ffn.get("router", no_choice), **ffn["experts"]}
    moe |= {name: ffn[name] for name in ("shared", "shared_gate") if name in ffn}
    return {"norm1": block["attention_norm"], "attention": attention, "norm2": block["ffn_norm"], "moe": moe}
