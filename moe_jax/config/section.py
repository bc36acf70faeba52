"""What the sections of a configuration share: the marks on their fields, and the checks of their values.

A mark says what a field's short flag is, from which starts a run keeps its value, and its limits (`setting`). The
command line reads the flags (`cli/settings.py`), and `training/start.py` compares the values. Standard library only.
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


def setting[T](
    default: T, flag: str = "", kept: Collection[Origin] = (), within: tuple[float, float] | None = None
) -> T:
    """A field with a short flag, such as `--steps`, or whose value is `kept` where a run starts from weights, or is a
    number `within` two limits."""
    marks = {"flag": flag, "kept": kept, "within": within}
    return dataclasses.field(default=default, metadata=marks)  # pyright: ignore[reportReturnType]


class Section:
    """Base class of the frozen dataclasses that make up a configuration."""

    section_name: ClassVar[str]
    """Its name in `config.json` and in flags. Empty for `RunConfig` itself."""

    def __post_init__(self) -> None:
        """Raise ConfigError unless each field holds a value that its type and its marks allow."""
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, f.name)
            if get_origin(f.type) is Literal:
                self.check(value in get_args(f.type), f.name, "one of " + ", ".join(get_args(f.type)))
            if limits := f.metadata.get("within"):
                low, high = limits
                ok = isinstance(value, int | float) and low <= value <= high  # false for NaN
                self.check(ok, f.name, f"between {format_bound(low)} and {format_bound(high)}")

    def check(self, ok: bool, name: str, allowed: str) -> None:
        """Raise ConfigError unless `ok`: "--flag value: must be ALLOWED"."""
        if not ok:
            raise self.wrong(name, f"must be {allowed}")

    def wrong(self, name: str, problem: str) -> ConfigError:
        """The error for a field's value: "--flag value: PROBLEM"."""
        return ConfigError(f"{flag_of(self, name)} {getattr(self, name)}: {problem}")

    def values(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every field that is not itself a section."""
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if not isinstance(value := getattr(self, f.name), Section):
                yield f.name, value

    def kept(self, name: str) -> Collection[Origin]:
        """The starts from which a run keeps the value of a field."""
        return self.__dataclass_fields__[name].metadata.get("kept", ())  # pyright: ignore[reportAttributeAccessIssue]


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
