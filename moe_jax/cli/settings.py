"""The settings of a run. They start from an origin; a file changes them, and then flags change them.

The origin (`origin.py`) is the preset, the run that is resumed, the dense run or model that is upcycled, the model that
is imported, or the run that is fine-tuned.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from moe_jax.cli.arguments import Argument, Values, arguments_of, read
from moe_jax.cli.command import Command, Group
from moe_jax.cli.origin import PRESET, Origin, override
from moe_jax.cli.settings_file import SettingsFile, read_settings
from moe_jax.config import SECTIONS, ConfigError, RunConfig
from moe_jax.config.compatibility import check_tuning
from moe_jax.config.presets import PRESETS, preset
from moe_jax.data.corpora import check_source
from moe_jax.system.errors import FieldError

OUT, VOCABULARY = ("", "out"), ("model", "vocab_size")

COMMON = (
    *("--preset", "--data", "--tokenizer", "--out", "--resume"),
    *("--steps", "--batch-size", "--lr", "--seed", "--precision"),
)
"""The usual flags. Help shows them first."""


class Settings(NamedTuple):
    """The settings of a run, and the saved configuration if the run is resumed."""

    config: RunConfig
    saved: RunConfig | None


AUTO = "auto"
"""The value of --preset with which the preset and its steps are chosen for the text (`planning/auto.py`)."""


@dataclass(frozen=True)
class RunCommand(Command):
    """A command that takes every setting of a run."""

    takes_auto: ClassVar[bool] = False
    """Whether --preset auto is allowed."""

    settings: Settings
    config: str | None = None
    """A TOML file of settings, with a table for each section. Flags override it."""

    @classmethod
    def arguments(cls) -> list[Argument]:
        return [*arguments_of(cls), *run_arguments(RunConfig(), cls.takes_auto)]

    @classmethod
    def groups(cls, argv: Sequence[str] = ()) -> list[Group]:
        """The usual flags, the other short flags, and the rest by section, with the defaults of the preset."""
        start = typed_preset(argv)
        rest = {a.flag: a for a in [*arguments_of(cls), *run_arguments(start, cls.takes_auto)]}
        common = [rest.pop(flag) for flag in COMMON]
        short = [rest.pop(flag) for flag in list(rest) if "." not in flag]
        found = [
            Group("flags that everybody uses", f"Defaults are those of preset {start.preset}.", common),
            Group("more flags", "", short),
        ]
        for section in SECTIONS:
            about = (type(start.section(section)).__doc__ or "").partition("\n")[0]
            found.append(Group(section, about, [a for a in rest.values() if a.section == section]))
        return found

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        found = read(cls.arguments(), argv)
        own = {a.name: found.pop(a.key) for a in arguments_of(cls) if a.key in found}
        path = own.get("config")
        file = SettingsFile() if path is None else read_settings(path, run_arguments(RunConfig(), cls.takes_auto))
        cls.settle(own, found, file.values)
        return cls(settings=cls.resolve(own, file, found), **own)

    @classmethod
    def resolve(cls, own: dict[str, Any], file: SettingsFile, flags: Values) -> Settings:
        """The settings. May add to the command's own values."""
        return resolve_settings(file, flags)

    @classmethod
    def settle(cls, own: dict[str, Any], flags: Values, file: Values) -> None:
        """Turn the command's own arguments into settings: add to `flags`."""


def run_arguments(start: RunConfig, takes_auto: bool = False) -> list[Argument]:
    """Every field of a run's configuration, with the defaults of `start`."""
    sections = ((section, start.section(section)) for section in ("", *SECTIONS))
    found = [a for section, owner in sections for a in arguments_of(type(owner), section, owner)]
    names = Literal[(*PRESETS, AUTO)]
    return [dataclasses.replace(a, annotation=names) if takes_auto and a.key == PRESET else a for a in found]


def resolve_settings(file: SettingsFile, flags: Values, planned: Values | None = None) -> Settings:
    """The settings from file and flags. Raises ConfigError if they do not fit each other, the data or the run.

    `planned` values stand for defaults of the preset.
    """
    given = (planned or {}) | file.values | flags
    origin = Origin.of(given).without_own_vocabulary()
    if origin.start.model.vocab_size and given.get(VOCABULARY) == 0:
        del given[VOCABULARY]  # 0 stands for the tokenizer's size, which the origin has by now
    try:
        config = override(origin.start, given)
        check_tuning(config)
        check_source(config.data, config.model.seq_len)
        origin.check_vocabulary(config)
    except ConfigError as error:
        raise _name_source(error, origin.start, file, flags) from None
    origin.check(config)
    return Settings(config, origin.saved)


def _name_source(error: ConfigError, start: RunConfig, file: SettingsFile, flags: Values) -> ConfigError:
    """The error to show. It names the file if the file has set the wrong field, or if the file is wrong by itself."""
    from_file = file.values.keys() - flags.keys()
    if not isinstance(error, FieldError):  # from `check_source`: the text does not exist
        return ConfigError(f"{file.path}: {error}") if ("data", "source") in from_file else error
    if error.field in from_file:
        return file.error(error.field, error.problem)
    try:
        override(start, file.values)
    except ConfigError:
        return ConfigError(f"{file.path}: {error}")
    return error


def typed_preset(argv: Sequence[str], default: str = RunConfig.preset) -> RunConfig:
    """The preset from argv if it exists, else the default preset. Help must work even if other arguments are wrong."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    names = [name for flag, name in itertools.pairwise(words) if flag == "--preset"]
    return preset(names[-1] if names and names[-1] in PRESETS else default)
