"""The names of flags, and what is said of a wrong value."""

import dataclasses
import math
from typing import Literal, get_args, get_origin

SHORT_FLAGS = {
    "--data": "--data.source",
    "--tokenizer": "--data.tokenizer",
    "--steps": "--train.steps",
    "--batch-size": "--train.batch-size",
    "--grad-accum": "--train.grad-accum",
    "--lr": "--train.lr",
    "--optimizer": "--train.optimizer",
    "--precision": "--train.precision",
    "--seed": "--train.seed",
    "--eval-every": "--train.eval-every",
    "--save-every": "--train.save-every",
    "--seq-len": "--model.seq-len",
    "--experts": "--model.experts",
    "--top-k": "--model.top-k",
    "--capacity-factor": "--model.capacity-factor",
    "--dispatch": "--model.dispatch",
}
_SHORT_OF = {long: short for short, long in SHORT_FLAGS.items()}


class ConfigError(ValueError):
    """A wrong value of a flag, or a wrong combination. One line that names the flag. Exit 2."""


def flag_of(section: str, name: str) -> str:
    """The flag that sets a field, by its short name where it has one: ("train", "steps") -> "--steps"."""
    long = f"--{section}.{name}".replace("_", "-") if section else f"--{name}".replace("_", "-")
    return _SHORT_OF.get(long, long)


def check(ok: bool, section: str, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{flag_of(section, name)} {value}: must be {allowed}")


def check_fields(config: object, section: str, names: tuple[str, ...], low: float, high: float) -> None:
    """Each named field is finite and within [low, high]."""
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
        check(ok, section, name, value, f"between {low:g} and {high:g}")


def check_choices(config: object, section: str) -> None:
    """Each field whose type is a Literal holds one of its values (tyro checks flags; this checks code and files)."""
    for f in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        if get_origin(f.type) is Literal:
            value = getattr(config, f.name)
            check(value in get_args(f.type), section, f.name, value, "one of " + ", ".join(get_args(f.type)))
