"""The settings of a preset with changes, for the scripts of this folder."""

from collections.abc import Sequence
from typing import Any

from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.presets import preset


def changes_of(config: RunConfig, texts: Sequence[str]) -> dict[tuple[str, str], Any]:
    """The values of `--set SECTION.NAME=VALUE`, each of the type that the field has in `config`, by section and name.

    Raises ConfigError for a field that does not exist, and for a value of another type.
    """
    known = {(section, name): value for section, name, value in config.settings() if section}
    values: dict[tuple[str, str], Any] = {}
    for text in texts:
        field, _, value = text.partition("=")
        section, _, name = field.strip().replace("-", "_").partition(".")
        if (section, name) not in known:
            raise ConfigError(f"--set {text}: must be SECTION.NAME=VALUE with a field of the configuration")
        kind = type(known[section, name])
        try:
            values[section, name] = value.lower() == "true" if kind is bool else kind(value)
        except ValueError:
            raise ConfigError(f"--set {text}: is no {kind.__name__}") from None
    return values


def preset_with(name: Any, texts: Sequence[str]) -> RunConfig:
    """The settings of a preset with the values of `--set`. Raises ConfigError."""
    config = preset(name)
    return config.override(changes_of(config, texts))
