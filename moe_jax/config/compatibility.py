"""Checks that new settings fit what they start from: a run that is resumed, a dense run or model that is upcycled, or a
model that is imported.

This module imports only the standard library, so that a wrong flag is reported before jax is imported.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_jax.config.flags import flag_of
from moe_jax.config.model import ModelConfig
from moe_jax.config.near_runs import missing_run
from moe_jax.config.presets import largest_vocabulary
from moe_jax.config.run import RunConfig, load_config
from moe_jax.system.errors import ConfigError, FieldError, UserError

_DATA_MAY_CHANGE = {"eval_tokens", "source"}
"""Fields of `data` that may change. The text itself is compared by its digest, once it is read."""

_IMPORTED_ROUTING = ("top_k", "renormalise_gates", "balancing")
"""Fields of the routing that decide what an imported model computes, or which parameters it has."""
IMPORTED_LR = 1e-4
"""Peak learning rate of a run that starts from a public model. The presets' rates are for a start from noise."""

_EXPERTS = {"dense", "experts", "expert_hidden", "shared_experts", "routing"}
"""Fields of the model that concern experts only. An upcycled run may choose them freely."""
_TRAINING_ONLY = {"dropout", "attention_dropout", "tie_value_output_init", "zero_init_residual"}
"""Fields of the model that change nothing in a forward pass of given weights without dropout."""


ROUTING_OF_MESH = "device_capacity_factor"
"""The field of the routing that matters on a mesh only. As the mesh, it may change at a resume."""
_ROUTING_MAY_CHANGE = {
    *("capacity_factor", "dispatch", "logit_noise", "input_jitter", "eval_capacity_factor"),
    ROUTING_OF_MESH,
}
"""Fields of the routing that change neither which experts a token chooses without noise, nor its gates."""

TUNING_LR, TUNING_LR_ADAPTERS = 1e-3, 3e-3
"""Peak learning rates of a fine-tuning of a run, chosen on preset nano. Adapters start at zero, and take a larger one.
A public model is fine-tuned at IMPORTED_LR."""


def check_resumable(saved: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError if model, routing, tokenizer, data or optimizer differ from the saved run.

    `ExecutionConfig`, which says how the model is computed, may change, and so may the rows of a device of a mesh.
    """
    fixed = [("", name) for name in ("preset", "upcycle", "init_from", "base")]
    fixed += [("train", name) for name in ("optimizer", "param_dtype", "lora_alpha", "train_router", "lora_rank")]
    routing = [field for field in _fields(config, "routing") if field[1] != ROUTING_OF_MESH]
    fixed += [*_fields(config, "model"), *routing, *_data_fields(config)]
    hint = "leave the flag out to resume it, or start a new run with another --out"
    _check_same(saved, config, fixed, f"the run in {config.run_dir}", hint)


def check_restartable(begun: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError if a run that starts again, because it has no checkpoint yet, would start from another preset
    or from other weights. Every other setting may change."""
    hint = "leave the flag out to start it again, or leave --resume out to start a new run there"
    fixed = [("", name) for name in ("preset", "upcycle", "init_from", "base")]
    _check_same(begun, config, fixed, f"the run that began in {config.run_dir}", hint)


def without_own_vocabulary(begun: RunConfig) -> RunConfig:
    """The settings of a run that begins again. Its vocabulary was that of the tokenizer, which is made again."""
    own = begun.model.vocab_size <= largest_vocabulary(begun.data)
    return dataclasses.replace(begun, model=dataclasses.replace(begun.model, vocab_size=0)) if own else begun


def check_vocabulary(config: RunConfig) -> None:
    """Raise ConfigError if the model of a new run may have fewer entries than its tokenizer."""
    given, entries = config.model.vocab_size, largest_vocabulary(config.data)
    if 0 < given < entries:
        kind = config.data.tokenizer
        known = "may have" if kind == "bpe" else "has"
        raise FieldError(
            "model",
            "vocab_size",
            f"{flag_of('model', 'vocab_size')} {given}",
            f"the {kind} tokenizer {known} {entries:,} entries; give at least that, or 0",
        )


def load_dense_config(folder: str) -> RunConfig:
    """The settings of the dense run that `--upcycle` names. Raises ConfigError where there is none."""
    try:
        dense = load_config(Path(folder))
    except UserError as error:
        raise ConfigError(f"--upcycle {folder}: {error}") from None
    if dense is None:
        raise ConfigError(missing_run("--upcycle", folder, "make one with --model.dense active"))
    if dense.model.dense == "none":
        raise ConfigError(f"--upcycle {folder}: has experts already; name a run made with --model.dense active")
    return dense


def upcycled_defaults(dense: RunConfig, folder: str) -> RunConfig:
    """The settings that an upcycled run starts from: the dense run's, with experts as wide as its dense network."""
    model = dataclasses.replace(dense.model, dense="none", expert_hidden=dense.model.dense_hidden, shared_experts=0)
    return dataclasses.replace(dense, upcycle=folder, out="", model=model)


def check_upcyclable(dense: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError unless the copied experts start as the dense network and can become different, and everything
    else is as in the dense run."""
    where = f"the dense run in {config.upcycle}"
    _check_copies(dense.model.dense_hidden, config, where)
    fixed = [("", "preset"), *_upcycled_fields(config), *_data_fields(config)]
    _check_same(dense, config, fixed, where, _SAME_FUNCTION)


def check_upcyclable_model(dense: ModelConfig, config: RunConfig) -> None:
    """The same for a dense model that was imported. `dense.seq_len` is the longest context that it reads."""
    where = f"the dense model in {config.upcycle}"
    _check_copies(dense.dense_hidden, config, where)
    _check_length(dense, config, where)
    fixed = [field for field in _upcycled_fields(config) if field != ("model", "seq_len")]
    data, execution = dataclasses.replace(config.data, tokenizer="hf"), dataclasses.replace(config.execution, mesh="")
    start = dataclasses.replace(config, model=dense, data=data, execution=execution)  # a mesh may divide experts
    _check_same(start, config, [("data", "tokenizer"), *fixed], where, _SAME_FUNCTION)


_SAME_FUNCTION = "leave the flag out: an upcycled run starts with the function that the dense run has learned"


def _check_copies(hidden: int, config: RunConfig, where: str) -> None:
    """Raise ConfigError unless the experts can be copies of a dense network with `hidden` units.

    Each expert starts as a copy of the dense feed-forward network. The gates of the K chosen experts sum to 1, so K
    equal copies give the output of the dense network. K = 1 is refused: its gate is the probability, which is less than
    1. Without `renormalise_gates` every gate is a probability, so that is refused too. K = E is refused: every expert
    would see every token, so the copies would see the same tokens.
    """
    model = config.model
    if model.dense != "none":
        raise ConfigError(f"--model.dense {model.dense}: --upcycle gives a dense run experts; leave one of them out")
    if model.expert_hidden != hidden:
        raise ConfigError(
            f"--model.expert-hidden {model.expert_hidden}: every expert becomes a copy of the network of {where}, "
            f"which has {hidden} hidden units; give that, or leave the flag out"
        )
    if not 1 < model.routing.top_k < model.experts:
        raise ConfigError(
            f"--top-k {model.routing.top_k}: with --upcycle it must be at least 2, so that the gates sum to 1, and "
            f"below --experts {model.experts}, so that the copies see different tokens"
        )
    if not model.routing.renormalise_gates:
        raise ConfigError(
            "--routing.renormalise-gates False: with --upcycle it must be on, so that the gates sum to 1; "
            "leave --routing.no-renormalise-gates out"
        )
    if model.shared_experts:
        raise ConfigError(
            f"--model.shared-experts {model.shared_experts}: a shared expert would add to the output of {where}; "
            "with --upcycle it must be 0"
        )


def _upcycled_fields(config: RunConfig) -> list[tuple[str, str]]:
    return [(s, name) for s, name in _fields(config, "model") if name not in _EXPERTS | _TRAINING_ONLY]


def imported_defaults(start: RunConfig, model: ModelConfig, folder: str) -> RunConfig:
    """The settings that a run of an imported model starts from: the model of the folder, the rest of `start`.

    The context is that of `start`, and at most what the model reads. The optimizer is AdamW with a low learning rate:
    the rates of the presets would destroy what the model has learned.
    """
    model = dataclasses.replace(model, seq_len=min(start.model.seq_len, model.seq_len))
    return dataclasses.replace(start, init_from=folder, **_gentle(start), model=model)


def upcycled_model_defaults(start: RunConfig, dense: ModelConfig, folder: str) -> RunConfig:
    """The settings that a run starts from that upcycles a dense model of a folder: its shape, with the experts of
    `start`, each as wide as the dense network."""
    experts = {"experts": start.model.experts, "routing": start.model.routing, "expert_hidden": dense.dense_hidden}
    length = min(start.model.seq_len, dense.seq_len)
    model = dataclasses.replace(dense, dense="none", seq_len=length, **experts)
    return dataclasses.replace(start, upcycle=folder, **_gentle(start), model=model)


def _gentle(start: RunConfig) -> dict[str, Any]:
    return {
        "data": dataclasses.replace(start.data, tokenizer="hf"),
        "train": dataclasses.replace(start.train, optimizer="adamw", lr=IMPORTED_LR),
    }


def check_imported(model: ModelConfig, config: RunConfig) -> None:
    """Raise ConfigError unless the settings are those of a model that is imported, where they must be.

    `model.seq_len` is the longest context that the model reads. How it is trained is free.
    """
    where = f"the model in {config.init_from}"
    _check_length(model, config, where)
    free = {"seq_len", "dropout", "attention_dropout"}
    fixed = [("data", "tokenizer"), *((s, name) for s, name in _fields(config, "model") if name not in free)]
    start = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, tokenizer="hf"))
    hint = "leave the flag out: the folder gives the shape of the model, and its tokenizer"
    if model.dense == "none":
        fixed += [("routing", name) for name in _IMPORTED_ROUTING]
    else:
        hint += "; to give a dense model experts, use --upcycle"
    _check_same(start, config, fixed, where, hint)


def _check_length(model: ModelConfig, config: RunConfig, where: str) -> None:
    if config.model.seq_len > model.seq_len:
        raise ConfigError(
            f"--seq-len {config.model.seq_len}: {where} reads {model.seq_len} positions at most; give that or less"
        )


def load_base_config(folder: str) -> RunConfig:
    """The settings of the run that `sft --run` names. Raises ConfigError where there is none."""
    try:
        base = load_config(Path(folder))
    except UserError as error:
        raise ConfigError(f"--run {folder}: {error}") from None
    if base is None:
        raise ConfigError(missing_run("--run", folder))
    return base


def tuned_defaults(base: RunConfig, folder: str, lora: bool) -> RunConfig:
    """The settings that a fine-tuning of `base` starts from: its model, its tokenizer, and a short training."""
    tracked = {"tensorboard": False, "wandb": False, "trackio": False}
    fresh = dataclasses.replace(base, base=folder, init_from="", upcycle="", out="", resume=False, **tracked)
    return for_conversations(fresh, TUNING_LR_ADAPTERS if lora else TUNING_LR)


def for_conversations(start: RunConfig, lr: float) -> RunConfig:
    """The settings with the data and the training of a fine-tuning, at a peak learning rate."""
    train = dataclasses.replace(
        start.train,
        steps=600,
        optimizer="adamw",
        muon_router=False,
        lr=lr,
        lr_schedule="linear",
        warmup_steps=20,
        weight_decay=0.0,
        eval_every=100,
        save_every=100,
        patience=0,
        lora_rank=0,
        lora_alpha=0.0,
        train_router=False,
    )
    return dataclasses.replace(start, train=train, data=dataclasses.replace(start.data, format="chat"))


def check_tunable(base: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError unless the tuned model has the parameters and the forward pass of the base model."""
    fixed = [(s, name) for s, name in _fields(config, "model") if name not in _TRAINING_ONLY]
    fixed += [(s, name) for s, name in _fields(config, "routing") if name not in _ROUTING_MAY_CHANGE]
    fixed += [("data", "tokenizer"), ("data", "vocab_size")]
    hint = "leave the flag out: a tuned run keeps the model and the tokenizer"
    _check_same(base, config, [("", "preset"), *fixed], f"the run in {config.base}", hint)


def check_tuning(config: RunConfig) -> None:
    """Raise ConfigError if settings for fine-tuning do not fit each other, or are given without a model to tune."""
    if config.base and (config.upcycle or config.init_from):
        flag = "--upcycle" if config.upcycle else "--init-from"
        raise ConfigError(f"{flag} {config.upcycle or config.init_from}: not with sft --run; do one after the other")
    if config.base and config.data.format != "chat":
        raise ConfigError(f"--data.format {config.data.format}: a run is fine-tuned on conversations; leave it out")
    if not config.base and not (config.init_from and config.data.format == "chat"):
        for section, name, plain in (("data", "format", "text"), ("train", "lora_rank", 0)):
            value = getattr(config.section(section), name)
            if value != plain:
                problem = "is for fine-tuning; use `uv run python -m moe_jax sft --run RUN`"
                raise FieldError(section, name, f"{flag_of(section, name)} {value}", problem)
        return
    if config.train.train_router and config.model.routing.balancing == "bias":
        raise ConfigError(
            "--train-router: not with --routing.balancing bias, whose biases belong to the routers as they are; "
            "leave it out"
        )
    if config.train.lora_rank and config.train.optimizer == "muon":
        raise ConfigError("--optimizer muon: is for whole matrices; with --lora leave it out, or take adamw")
    if config.train.train_router and config.model.dense != "none":
        raise ConfigError("--train-router: this model is dense and has no router; leave it out")


def _fields(config: RunConfig, section: str) -> list[tuple[str, str]]:
    """(section, name) of every field of a section that is not a section itself."""
    owner = config.section(section)
    return [
        (section, f.name) for f in dataclasses.fields(owner) if not dataclasses.is_dataclass(getattr(owner, f.name))
    ]


def _data_fields(config: RunConfig) -> list[tuple[str, str]]:
    return [(s, name) for s, name in _fields(config, "data") if name not in _DATA_MAY_CHANGE]


def _check_same(there: RunConfig, here: RunConfig, fields: Iterable[tuple[str, str]], where: str, hint: str) -> None:
    for section, name in fields:
        old, new = (getattr(c.section(section), name) for c in (there, here))
        if old != new:
            raise ConfigError(f"{flag_of(section, name)} {new}: {where} has {old}; {hint}")
