"""The arguments of a command, from a frozen dataclass: argv becomes values, a wrong argument becomes one sentence.

A field is a flag, or a positional argument where its metadata is POSITIONAL. The annotation is the type: int, float,
str, bool, Literal, `int | None`, `str | None`, `list[str]` (repeated). A bool is a switch with two names, --x and
--no-x. The string literal below a field is its help (`help.py`).

`read` replaces the parser of argparse, which takes the value in `--lr -1e-3` for a flag, gives the value of an unknown
flag to a positional argument, and has errors of several lines.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from moe_jax.config import ConfigError
from moe_jax.config.section import flag_of, long_flag

Values = dict[tuple[str, str], Any]
"""(section, name) -> the value of an argument."""

HINT = "--help all lists every flag"
POSITIONAL = {"positional": True}
"""Metadata of a field that is given by its position instead of by a flag."""


@dataclass(frozen=True)
class Argument:
    """One field of a command or of a run's configuration."""

    owner: type
    """The dataclass that has the field."""
    section: str
    """Section of the configuration; "" for a command's own fields and those of `RunConfig`."""
    name: str
    annotation: Any
    default: Any
    """MISSING if a value must be given."""
    metadata: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return (self.section, self.name)

    @property
    def positional(self) -> bool:
        return self.metadata.get("positional", False)

    @property
    def is_flag(self) -> bool:
        """False for a field that only `--set` sets."""
        return not self.metadata.get("no_flag", False)

    @property
    def flag(self) -> str:
        """Its name in errors: the short flag if it has one."""
        return self.name.upper() if self.positional else flag_of(self.section, self.name)

    @property
    def flags(self) -> list[str]:
        """Its names, the short one first."""
        return list(dict.fromkeys([self.flag, long_flag(self.section, self.name)]))

    @property
    def off_flags(self) -> list[str]:
        """The names that turn a switch off: --no-model.remat for --model.remat."""
        return [f"--no-{flag.removeprefix('--')}" for flag in self.flags] if self.kind is bool else []

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.annotation) if get_origin(self.annotation) is Literal else ()

    @property
    def kind(self) -> Any:
        """The type of one value."""
        inner = [a for a in get_args(self.annotation) if a is not NoneType]
        return str if self.choices else inner[0] if inner else self.annotation

    @property
    def repeated(self) -> bool:
        return get_origin(self.annotation) is list

    def wrong(self, value: object, problem: str) -> ConfigError:
        return ConfigError(f"{self.flag}{' ' if self.is_flag else '='}{value}: {problem}")

    def from_text(self, text: str) -> Any:
        """The value of a typed text; of a switch `true` or `false`, as `--set` takes it. Raises ConfigError."""
        if self.kind is bool:
            if text.lower() not in ("true", "false"):
                raise self.wrong(text, "must be true or false")
            return text.lower() == "true"
        try:
            value = self.kind(text)
        except ValueError:
            raise self.wrong(text, "is not a whole number" if self.kind is int else "is not a number") from None
        return self.checked(value)

    def checked(self, value: Any) -> Any:
        """The value, if it is among the choices, or a text that can be printed and name a file. Raises ConfigError."""
        if self.choices and value not in self.choices:
            raise self.wrong(value, "must be one of " + ", ".join(self.choices))
        # Python stands in surrogates for bytes of argv that are not UTF-8.
        if self.kind is str and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
            raise self.wrong(ascii(value), "is not UTF-8, or holds a zero byte; give it in UTF-8")
        return value


def arguments_of(kind: type, section: str = "", start: Any = None) -> Iterator[Argument]:
    """The fields of a dataclass that hold plain values. Defaults come from the instance `start` if it is given."""
    for f in dataclasses.fields(kind):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        default = default if start is None else getattr(start, f.name)
        argument = Argument(kind, section, f.name, f.type, default, f.metadata)
        if argument.kind in (int, float, str, bool):
            yield argument


def read(arguments: Sequence[Argument], argv: Sequence[str]) -> Values:
    """The values of argv. If a flag is given twice, the last value counts. Raises ConfigError."""
    flags = {flag: a for a in arguments if a.is_flag and not a.positional for flag in (*a.flags, *a.off_flags)}
    places = [a for a in arguments if a.positional]
    values: Values = {}
    words, switch = list(argv), ""
    while words:
        word = words.pop(0)
        typed, equals, text = word.partition("=")
        flag = typed.replace("_", "-")
        if not word.startswith("-"):
            if not places:
                raise _no_value(switch, word) if switch else ConfigError(f"{word}: belongs to no flag; {HINT}")
            argument = places.pop(0)
            values[argument.key] = argument.from_text(word)
            continue
        if flag not in flags:
            known = {name: a.flag for a in arguments for name in a.flags} | {name: name for name in flags}
            raise ConfigError(f"{typed}: no such flag{perhaps(flag, known)}; {HINT}")
        argument = flags[flag]
        switch = flag if argument.kind is bool else ""
        if switch:
            if equals:
                raise _no_value(flag, text)
            values[argument.key] = flag in argument.flags
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{argument.flag}: needs a value; {HINT}")
            text = words.pop(0)
        value = argument.from_text(text)
        values[argument.key] = [*values.get(argument.key, []), value] if argument.repeated else value
    return values


def _no_value(switch: str, text: str) -> ConfigError:
    return ConfigError(f"{switch} {text}: takes no value; it is given, or left out")


def require(arguments: Iterable[Argument], values: Values) -> None:
    """Raise ConfigError unless every argument without a default is given."""
    for a in arguments:
        if a.default is MISSING and a.key not in values:
            allowed = ", one of " + ", ".join(a.choices) if a.choices else ""
            raise ConfigError(f"{a.flag}: must be given{allowed}; {HINT}")


def perhaps(typed: str, known: Mapping[str, str]) -> str:
    """A hint with the known names nearest to `typed`: "; perhaps --experts was meant". Empty if no name is near.

    `known` maps each accepted name to the name that the hint shows. A field of another section is near, because the
    last part of its name is the same.
    """
    last = typed.removeprefix("--").rpartition(".")[2]
    near = [shown for name, shown in known.items() if name.removeprefix("--").rpartition(".")[2] == last]
    near = near or [known[name] for name in difflib.get_close_matches(typed, known, n=3, cutoff=0.75)]
    near = list(dict.fromkeys(near))[:2]
    return f"; perhaps {' or '.join(near)} was meant" if near else ""
