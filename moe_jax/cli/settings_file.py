"""`--config FILE.toml`: settings in a file. Tables are sections; keys are the fields' names.

preset = "story-cpu"

[routing]
top_k = 2

[train]
lr = 1e-3
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.cli.arguments import Argument, Values, perhaps
from moe_jax.config import SECTIONS, ConfigError
from moe_jax.system.errors import FieldError

LARGEST = 2**63 - 1
"""Largest whole number of TOML. Python reads larger ones too, which then cannot be made floats, or be printed."""


class SettingsFile(NamedTuple):
    """The values that a file sets. They are empty without a file."""

    path: str = ""
    values: Values = {}  # noqa: RUF012, a default that nobody changes

    def error(self, field: tuple[str, str], problem: str) -> ConfigError:
        """The error for a wrong value: one line with the file and the key."""
        return ConfigError(f"{self.path}: {_key(*field)} = {self.values[field]!r}: {problem}")


def read_settings(path: str, arguments: Iterable[Argument]) -> SettingsFile:
    """The settings of a file, with the right types. Raises a ConfigError that names the file and the key."""
    by_key = {a.key: a for a in arguments}
    values: Values = {}
    for (section, name), value in _entries(path, _load(path)):
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{path}: {_key(section, name)}: a whole number of more than 64 bits; give a smaller one")
        argument = by_key.get((section, name))
        if argument is None:
            raise ConfigError(f"{path}: {_key(section, name)}: no such setting{_near(section, name, by_key)}")
        try:
            values[argument.key] = argument.from_toml(value)
        except FieldError as error:
            raise SettingsFile(path, {argument.key: value}).error(argument.key, error.problem) from None
    return SettingsFile(path, values)


def _load(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: must be a TOML file that can be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: must be a TOML file; {error}") from None


def _entries(path: str, document: dict[str, Any]) -> Iterable[tuple[tuple[str, str], Any]]:
    """((section, name), value) of a document."""
    for key, value in document.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {key} = {value!r}: must be a table [{key}]")
            yield from (((key, name.replace("-", "_")), inner) for name, inner in value.items())
        else:
            yield ("", key.replace("-", "_")), value


def _key(section: str, name: str) -> str:
    return f"[{section}] {name}" if section else name


def _near(section: str, name: str, known: Mapping[tuple[str, str], Argument]) -> str:
    """The nearest settings, those of the same table first."""
    called = {field: field for s, field in known if s == section}
    called |= {section: f"[{section}]" for section in SECTIONS}
    called |= {f"{s}.{field}": _key(s, field) for s, field in known if s != section}
    return perhaps(name, called)
