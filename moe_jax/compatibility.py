"""Which settings fit a run that is there already: one that is resumed, or a dense one whose experts become copies.

Standard library only, as `config.py`, so that a wrong flag is answered before jax is imported.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from moe_jax.config import ConfigError, RunConfig, UserError, load_config
from moe_jax.flags import flag_of

_DATA_MAY_CHANGE = {"eval_tokens", "source"}
"""The text itself is compared by its digest, once it is read."""

_ROUTED = {
    *("dense", "experts", "top_k", "expert_hidden", "shared_experts", "capacity_factor", "eval_capacity_factor"),
    *("dispatch", "priority", "balancing", "router_noise", "router_jitter"),
}
"""What concerns experts only, and is chosen anew where a dense run is upcycled."""
_FUNCTION_KEEPS = _ROUTED | {"dropout", "attention_dropout", "copying_heads"}
"""Fields of the model without a say in what a forward pass without drops computes from given weights."""


def check_resumable(saved: RunConfig, config: RunConfig) -> None:
    """Refuse a change that the checkpoint does not fit: model, tokenizer, data or optimizer. Raises ConfigError."""
    fixed = [("", "preset"), ("", "upcycle"), ("train", "optimizer"), ("train", "weights")]
    fixed += [("model", f.name) for f in dataclasses.fields(config.model)]
    hint = "leave the flag out to resume it, or start a new run with another --out"
    _check_same(saved, config, [*fixed, *_data_fields(config)], f"the run in {config.run_dir}", hint)


def dense_run(folder: str) -> RunConfig:
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


def upcycled(dense: RunConfig, folder: str) -> RunConfig:
    """What the settings of a run that is upcycled from a dense one start from: the same, and each expert as wide as
    the dense FFN."""
    model = dataclasses.replace(dense.model, dense="none", expert_hidden=dense.model.dense_hidden, shared_experts=0)
    return dataclasses.replace(dense, upcycle=folder, out="", model=model)


def check_upcyclable(dense: RunConfig, config: RunConfig) -> None:
    """Refuse settings under which a model whose experts are copies of the dense FFN would be another function than
    the dense model, or whose copies could not part. Raises ConfigError.

    The gates of the K chosen sum to 1, so K copies give what one does; but for K = 1 the gate is the probability
    itself. With K = E every copy would see every token.
    """
    model, hidden = config.model, dense.model.dense_hidden
    where = f"the dense run in {config.upcycle}"
    if model.dense != "none":
        raise ConfigError(f"--model.dense {model.dense}: --upcycle gives a dense run experts; leave one of them out")
    if model.expert_hidden != hidden:
        raise ConfigError(
            f"--model.expert-hidden {model.expert_hidden}: every expert becomes a copy of the FFN of {where}, "
            f"which has {hidden} hidden units; give that, or leave the flag out"
        )
    if not 1 < model.top_k < model.experts:
        raise ConfigError(
            f"--top-k {model.top_k}: with --upcycle it must be at least 2, so that the gates sum to 1, and below "
            f"--experts {model.experts}, so that the copies see different tokens"
        )
    if model.shared_experts:
        raise ConfigError(
            f"--model.shared-experts {model.shared_experts}: would add to what {where} computes; "
            "with --upcycle it must be 0"
        )
    fixed = [("model", f.name) for f in dataclasses.fields(model) if f.name not in _FUNCTION_KEEPS]
    hint = "leave the flag out, for an upcycled run begins as the function that the dense one has learned"
    _check_same(dense, config, [("", "preset"), *fixed, *_data_fields(config)], where, hint)


def _data_fields(config: RunConfig) -> list[tuple[str, str]]:
    return [("data", f.name) for f in dataclasses.fields(config.data) if f.name not in _DATA_MAY_CHANGE]


def _check_same(there: RunConfig, here: RunConfig, fields: Iterable[tuple[str, str]], where: str, hint: str) -> None:
    for section, name in fields:
        old, new = (getattr(getattr(c, section) if section else c, name) for c in (there, here))
        if old != new:
            raise ConfigError(f"{flag_of(section, name)} {new}: {where} has {old}; {hint}")
