"""What the sections of a configuration share: the marks on their fields, and the checks of their values.

A mark says what a field's short flag is, and from which starts a run keeps its value (`setting`). The command line
reads the flags (`cli/settings.py`), and `training/start.py` compares the values. Standard library only.
"""

import dataclasses
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin

from moe_jax.system.errors import ConfigError

type Origin = Literal["resume", "tune", "upcycle", "import"]
"""Where the weights of a run come from, if not from noise: its own last checkpoint, a trained run that is fine-tuned, a
dense run whose network becomes every expert, or a public model."""

ALWAYS: tuple[Origin, ...] = ("resume", "tune", "upcycle", "import")


def setting[T](default: T, flag: str = "", kept: Collection[Origin] = ()) -> T:
    """A field with a short flag, such as `--steps`, or whose value is `kept` where a run starts from weights."""
    return dataclasses.field(default=default, metadata={"flag": flag, "kept": kept})  # pyright: ignore[reportReturnType]


class Section:
    """Base class of the frozen dataclasses that make up a configuration."""

    section_name: ClassVar[str]
    """Its name in `config.json` and in flags. Empty for `RunConfig` itself."""

    def check(self, ok: bool, name: str, allowed: str) -> None:
        """Raise ConfigError unless `ok`: "--flag value: must be ALLOWED"."""
        if not ok:
            raise self.wrong(name, f"must be {allowed}")

    def wrong(self, name: str, problem: str) -> ConfigError:
        """The error for a field's value: "--flag value: PROBLEM"."""
        return ConfigError(f"{flag_of(self, name)} {getattr(self, name)}: {problem}")

    def check_range(self, names: tuple[str, ...], low: float, high: float) -> None:
        """Raise ConfigError unless each named field is a finite number within [low, high]."""
        for name in names:
            value = getattr(self, name)
            ok = isinstance(value, int | float) and low <= value <= high  # false for NaN
            self.check(ok, name, f"between {format_bound(low)} and {format_bound(high)}")

    def check_choices(self) -> None:
        """Raise ConfigError unless each field whose type is a Literal holds one of its values."""
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if get_origin(f.type) is Literal:
                allowed = get_args(f.type)
                self.check(getattr(self, f.name) in allowed, f.name, "one of " + ", ".join(allowed))

    def values(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every field that is not itself a section."""
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if not isinstance(value := getattr(self, f.name), Section):
                yield f.name, value

    def kept(self, origin: Origin) -> Iterator[str]:
        """The fields whose value a run keeps that starts from such weights."""
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if origin in f.metadata.get("kept", ()):
                yield f.name


@cache
def short_flags(kind: type[Section]) -> dict[str, str]:
    """Field -> its short flag, or ""."""
    return {f.name: f.metadata.get("flag", "") for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]


def long_flag(section: Section, name: str) -> str:
    """The flag that every field has, such as `--train.muon-lr`."""
    return "--" + f"{section.section_name}.{name}".lstrip(".").replace("_", "-")


def flag_of(section: Section, name: str) -> str:
    """The flag by which messages call a field: the short one if there is one."""
    return short_flags(type(section)).get(name) or long_flag(section, name)


def format_bound(bound: float) -> str:
    """A limit as an error shows it, such as 1,000,000 or 0.5."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
