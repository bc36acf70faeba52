"""What the settings of a run start from, with --init-from, --upcycle, or `sft --run`. Standard library only."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moe_jax.config import ConfigError, RunConfig, holds_run
from moe_jax.config.compatibility import (
    IMPORTED_LR,
    check_imported,
    check_tunable,
    check_upcyclable,
    check_upcyclable_model,
    for_conversations,
    imported_defaults,
    load_base_config,
    load_dense_config,
    tuned_defaults,
    upcycled_defaults,
    upcycled_model_defaults,
)
from moe_jax.interop.pretrained_shape import PretrainedShape, holds_pretrained, read_shape


class StartingPoint(NamedTuple):
    """The settings that others change, and the check of the changed ones."""

    defaults: RunConfig
    check: Callable[[RunConfig], None]
    """Raises ConfigError."""
    shape: PretrainedShape | None
    """Of a Hugging Face model. None for a run."""


def starting_point(asked: RunConfig, chat: bool = False, lora: bool = False) -> StartingPoint | None:
    """What --init-from, --upcycle or `sft --run` names; None if none is given. A folder is told by its content. With
    `chat` the defaults are those of fine-tuning, with `lora` those of adapters.

    Raises ConfigError where the folder is not there, and UserError where its model cannot be held.
    """
    if asked.base:
        base = load_base_config(asked.base)
        return StartingPoint(tuned_defaults(base, asked.base, lora), partial(check_tunable, base), None)
    if asked.init_from:
        shape = read_shape(Path(asked.init_from), "--init-from")
        defaults = imported_defaults(asked, shape.model, asked.init_from)
        if chat:
            defaults = for_conversations(defaults, IMPORTED_LR)
        return StartingPoint(defaults, partial(check_imported, shape.model), shape)
    if not asked.upcycle:
        return None
    folder = Path(asked.upcycle)
    if holds_run(folder) or not holds_pretrained(folder):
        dense = load_dense_config(asked.upcycle)
        return StartingPoint(upcycled_defaults(dense, asked.upcycle), partial(check_upcyclable, dense), None)
    shape = read_shape(folder, "--upcycle")
    if shape.model.dense == "none":
        raise ConfigError(f"--upcycle {folder}: has experts already; start from it with --init-from")
    defaults = upcycled_model_defaults(asked, shape.model, asked.upcycle)
    return StartingPoint(defaults, partial(check_upcyclable_model, shape.model), shape)
