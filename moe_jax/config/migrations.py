"""Convert a configuration of an earlier version to the present one. Standard library only.

`config.json` and the manifest of a checkpoint both hold a configuration with its `schema_version`. To rename a field,
raise SCHEMA_VERSION and add to `_MIGRATIONS` a function from the previous version. No other module knows an old name.
"""

from collections.abc import Callable
from typing import Any

from moe_jax.config.flags import flag_of, long_flag
from moe_jax.system.errors import UserError

SCHEMA_VERSION = 3


def migrate_config(values: dict[str, Any]) -> dict[str, Any]:
    """The same configuration in the present schema (SCHEMA_VERSION).

    Raises UserError for an unknown version, and for a configuration that uses a feature that no longer exists. The
    error names the feature.
    """
    version = values.get("schema_version")
    while version != SCHEMA_VERSION:
        if version not in _MIGRATIONS:
            raise UserError(
                f"config.json has schema version {version}, this program reads 1 to {SCHEMA_VERSION}: "
                "use the version of moe-jax that wrote it, or start a new run in another folder"
            )
        values = _MIGRATIONS[version](values)
        version = values["schema_version"]
    return values


def _from_version_1(old: dict[str, Any]) -> dict[str, Any]:
    """In version 1 routing was part of the model, execution was part of training, and some fields had other names."""
    new = {k: v for k, v in old.items() if k not in ("verify_resume", "deterministic")}
    model, train = dict(old.get("model", {})), dict(old.get("train", {}))
    if model.pop("ngrams", 1) != 1:
        raise UserError(
            "config.json: model.ngrams is not 1, and this version has no n-gram tables: use moe-jax 0.1.0 for this run"
        )
    model.pop("ngram_rows", None)
    routing = _pop_renamed(model, _ROUTING_1)
    if "dispatch" in routing:
        if routing["dispatch"] not in _DISPATCH_1:
            raise UserError(f"config.json: model.dispatch {routing['dispatch']!r} is not known; the file was changed")
        routing["dispatch"] = _DISPATCH_1[routing["dispatch"]]
    execution = _pop_renamed(train, _EXECUTION_1)
    if "deterministic" in old:
        execution["deterministic"] = old["deterministic"]
    new["model"] = _pop_renamed(model, _MODEL_1) | model
    new["train"] = _pop_renamed(train, _TRAIN_1) | train
    return new | {"routing": routing, "execution": execution, "schema_version": 2}


def _from_version_2(old: dict[str, Any]) -> dict[str, Any]:
    """In version 2 `qk_norm` was true or false. True normalised each head by itself."""
    new, model = old | {"schema_version": 3}, old.get("model")
    if isinstance(model, dict) and isinstance(model.get("qk_norm"), bool):
        new["model"] = model | {"qk_norm": _QK_NORM_2[model["qk_norm"]]}
    return new


_QK_NORM_2 = {True: "head", False: "none"}

_ROUTING_1 = {
    "top_k": "top_k",
    "capacity_factor": "capacity_factor",
    "dispatch": "dispatch",
    "priority": "priority",
    "balancing": "balancing",
    "router_noise": "logit_noise",
    "router_jitter": "input_jitter",
    "eval_capacity_factor": "eval_capacity_factor",
}
_DISPATCH_1 = {"gather": "capacity", "einsum": "capacity", "blocks": "blocks", "dense": "blocks"}
"""`einsum` and `dense` were slow reference forms. Each computes the same function as the form that it becomes."""
_EXECUTION_1 = {"precision": "compute_dtype", "remat": "remat"}
_MODEL_1 = {"copying_heads": "tie_value_output_init", "quiet_branches": "zero_init_residual"}
_TRAIN_1 = {
    "decay": "lr_schedule",
    "final_lr": "final_lr_ratio",
    "clip": "max_grad_norm",
    "balance_coef": "aux_loss_coef",
    "balance_rate": "router_bias_lr",
    "z_coef": "z_loss_coef",
    "weights": "param_dtype",
}


RENAMED_FLAGS = {
    long_flag(before, old): flag_of(now, new)
    for before, now, names in (
        ("model", "routing", _ROUTING_1),
        ("model", "model", _MODEL_1),
        ("train", "train", _TRAIN_1),
        ("train", "execution", _EXECUTION_1),
    )
    for old, new in names.items()
}
"""Flag of an earlier version -> its present name, for whoever types the old one."""

FORMER_SWITCHES = {
    flag_of("model", "qk_norm"): f"{flag_of('model', 'qk_norm')} {_QK_NORM_2[True]}",
    "--no-" + flag_of("model", "qk_norm").removeprefix("--"): f"{flag_of('model', 'qk_norm')} {_QK_NORM_2[False]}",
}
"""Switch of an earlier version, which takes a value now -> what to type for it."""


def _pop_renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Remove the old names from `values`, and return their values under the new names."""
    return {new: values.pop(old) for old, new in names.items() if old in values}


_MIGRATIONS: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_version_1,
    2: _from_version_2,
}
"""Version -> the function that converts a configuration of this version to the next version."""
