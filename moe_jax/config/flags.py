"""The names of flags, and the checks that name them in their errors. Standard library only.

Every field of a section has the flag `--section.field`, with hyphens for underscores. The most used flags have a short
name as well.
"""

import dataclasses
from typing import Literal, get_args, get_origin

from moe_jax.system.errors import FieldError

SHORT_FLAGS = {
    "--data": "--data.source",
    "--tokenizer": "--data.tokenizer",
    "--steps": "--train.steps",
    "--batch-size": "--train.batch-size",
    "--grad-accum": "--train.grad-accum",
    "--lr": "--train.lr",
    "--optimizer": "--train.optimizer",
    "--lora": "--train.lora-rank",
    "--lora-alpha": "--train.lora-alpha",
    "--train-router": "--train.train-router",
    "--seed": "--train.seed",
    "--eval-every": "--train.eval-every",
    "--save-every": "--train.save-every",
    "--precision": "--execution.compute-dtype",
    "--deterministic": "--execution.deterministic",
    "--mesh": "--execution.mesh",
    "--seq-len": "--model.seq-len",
    "--experts": "--model.experts",
    "--top-k": "--routing.top-k",
    "--capacity-factor": "--routing.capacity-factor",
    "--dispatch": "--routing.dispatch",
}
"""Short name -> long name."""

_SHORT_OF = {long: short for short, long in SHORT_FLAGS.items()}


def long_flag(section: str, name: str) -> str:
    """The flag that every field has: ("train", "batch_size") -> "--train.batch-size".

    The section "" holds the fields of `RunConfig` itself.
    """
    return "--" + f"{section}.{name}".lstrip(".").replace("_", "-")


def flag_of(section: str, name: str) -> str:
    """The flag that sets a field, by its short name if it has one: ("train", "steps") -> "--steps"."""
    long = long_flag(section, name)
    return _SHORT_OF.get(long, long)


def check(ok: bool, section: str, name: str, value: object, allowed: str) -> None:
    """Raise ConfigError unless `ok`: "--flag value: must be ALLOWED"."""
    if not ok:
        raise FieldError(section, name, f"{flag_of(section, name)} {value}", f"must be {allowed}")


def bound_in_words(bound: float) -> str:
    """A limit as it is shown to a person, such as 1,000,000 or 0.5."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def check_range(config: object, section: str, names: tuple[str, ...], low: float, high: float) -> None:
    """Raise ConfigError unless each named field is a finite number within [low, high]."""
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int | float) and low <= value <= high  # NaN is not; an int may be too large for a float
        check(ok, section, name, value, f"between {bound_in_words(low)} and {bound_in_words(high)}")


def check_choices(config: object, section: str) -> None:
    """Raise ConfigError unless each field whose type is a Literal holds one of its values."""
    for f in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        if get_origin(f.type) is Literal:
            value = getattr(config, f.name)
            check(value in get_args(f.type), section, f.name, value, "one of " + ", ".join(get_args(f.type)))
