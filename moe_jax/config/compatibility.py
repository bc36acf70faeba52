"""Checks that new settings fit an existing run: a run that is resumed, or a dense run that is upcycled.

This module imports only the standard library, so that a wrong flag is reported before jax is imported.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from moe_jax.config.flags import flag_of
from moe_jax.config.presets import largest_vocabulary
from moe_jax.config.run import RunConfig, load_config
from moe_jax.system.errors import ConfigError, FieldError, UserError

_DATA_MAY_CHANGE = {"eval_tokens", "source"}
"""Fields of `data` that may change. The text itself is compared by its digest, once it is read."""

_EXPERTS = {"dense", "experts", "expert_hidden", "shared_experts", "routing"}
"""Fields of the model that concern experts only. An upcycled run may choose them freely."""
_TRAINING_ONLY = {"dropout", "attention_dropout", "tie_value_output_init", "zero_init_residual"}
"""Fields of the model that change nothing in a forward pass of given weights without dropout."""


def check_resumable(saved: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError if model, routing, tokenizer, data or optimizer differ from the saved run.

    `ExecutionConfig`, which says how the model is computed, may change.
    """
    fixed = [("", "preset"), ("", "upcycle"), ("train", "optimizer"), ("train", "param_dtype")]
    fixed += [*_fields(config, "model"), *_fields(config, "routing"), *_data_fields(config)]
    hint = "leave the flag out to resume it, or start a new run with another --out"
    _check_same(saved, config, fixed, f"the run in {config.run_dir}", hint)


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
        raise ConfigError(
            f"--upcycle {folder}: no run with a complete checkpoint there; make one with --model.dense active"
        )
    if dense.model.dense == "none":
        raise ConfigError(f"--upcycle {folder}: has experts already; name a run made with --model.dense active")
    return dense


def upcycled_defaults(dense: RunConfig, folder: str) -> RunConfig:
    """The settings that an upcycled run starts from: the dense run's, with experts as wide as its dense network."""
    model = dataclasses.replace(dense.model, dense="none", expert_hidden=dense.model.dense_hidden, shared_experts=0)
    return dataclasses.replace(dense, upcycle=folder, out="", model=model)


def check_upcyclable(dense: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError unless the copied experts start as the dense network and can become different.

    Each expert starts as a copy of the dense feed-forward network. The gates of the K chosen experts sum to 1, so K
    equal copies give the output of the dense network. K = 1 is refused: its gate is the probability, which is less than
    1. Without `renormalise_gates` every gate is a probability, so that is refused too. K = E is refused: every expert
    would see every token, so the copies would see the same tokens.
    """
    model, hidden = config.model, dense.model.dense_hidden
    where = f"the dense run in {config.upcycle}"
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
    fixed = [(s, name) for s, name in _fields(config, "model") if name not in _EXPERTS | _TRAINING_ONLY]
    hint = "leave the flag out: an upcycled run starts with the function that the dense run has learned"
    _check_same(dense, config, [("", "preset"), *fixed, *_data_fields(config)], where, hint)


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
