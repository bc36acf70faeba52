"""The settings of a run. They start from a preset, a run or a model (`training/start.py`). A file changes them, then
flags change them. With `--preset auto` the preset is chosen for the text.

    preset = "story-cpu"                    `--config FILE.toml`: tables are sections, keys are the fields' names

    [train]
    lr = 1e-3
"""

import dataclasses
import itertools
import tomllib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from moe_jax.cli.arguments import Argument, Values, arguments_of, perhaps, read
from moe_jax.cli.command import Command, Group, check_range
from moe_jax.config import SECTIONS, ConfigError, DataConfig, PresetName, RunConfig
from moe_jax.config.presets import PRESETS, preset
from moe_jax.config.section import flag_of
from moe_jax.data.corpora import check_source
from moe_jax.system.errors import FieldError
from moe_jax.system.terminal import working
from moe_jax.training.start import Start, start_of

OUT, PRESET, SOURCE, VOCABULARY = ("", "out"), ("", "preset"), ("data", "source"), ("model", "vocab_size")
AUTO = "auto"
"""The value of --preset with which the preset and its steps are chosen for the text."""
COMMON = (
    *("--preset", "--data", "--tokenizer", "--out", "--resume"),
    *("--steps", "--batch-size", "--lr", "--seed", "--precision", "--config", "--set"),
)
"""The usual flags. Without `all`, help shows only them and a few of the command's own."""
LARGEST = 2**63 - 1
"""Largest whole number of TOML. Python reads larger ones too, which then cannot be made floats, or be printed."""


class Settings(NamedTuple):
    """The settings of a run, and what the run starts from."""

    config: RunConfig
    start: Start


class SettingsFile(NamedTuple):
    """The values that a file sets. They are empty without a file."""

    path: str = ""
    values: Values = {}  # noqa: RUF012, a default that nobody changes

    def only(self, keys: Container[tuple[str, str]]) -> "SettingsFile":
        """The file without other settings."""
        return SettingsFile(self.path, {key: value for key, value in self.values.items() if key in keys})

    def error(self, field: tuple[str, str], problem: str) -> ConfigError:
        """The error for a wrong value: one line with the file and the key."""
        return ConfigError(f"{self.path}: {_key(*field)} = {self.values[field]!r}: {problem}")


@dataclass(frozen=True)
class RunCommand(Command):
    """A command that takes every setting of a run."""

    takes_auto: ClassVar[bool] = False
    """Whether --preset auto is allowed."""
    usual: ClassVar[tuple[str, ...]] = ("dry_run", "run")
    """Fields of the command that help shows beside the usual flags."""
    preset: ClassVar[PresetName] = RunConfig.preset
    """The preset whose defaults help shows, unless another one is typed."""

    settings: Settings
    config: str | None = None
    """A TOML file of settings, with a table for each section. Flags override it."""
    set: list[str] = field(default_factory=list)
    """SECTION.NAME=VALUE: any field of the configuration, such as train.beta2=0.99."""

    @classmethod
    def settable(cls, start: RunConfig) -> list[Argument]:
        """The settings that the command takes, with the defaults of `start`."""
        return run_arguments(start, cls.takes_auto)

    @classmethod
    def arguments(cls) -> list[Argument]:
        return [*arguments_of(cls), *cls.settable(RunConfig())]

    @classmethod
    def groups(cls, argv: Sequence[str] = ()) -> list[Group]:
        """The usual flags, then the command's own and the rest by section, with the defaults of the typed preset."""
        start = typed_preset(argv, cls.preset)
        rest = {a.flag: a for a in [*arguments_of(cls), *cls.settable(start)] if a.is_flag}
        common = [rest.pop(flag) for flag in COMMON if flag in rest]
        common += [rest.pop(flag) for flag in list(rest) if rest[flag].name in cls.usual]
        own = [rest.pop(a.flag) for a in arguments_of(cls) if a.flag in rest]
        groups = [
            Group("flags that everybody uses", f"Defaults are those of preset {start.preset}.", common),
            Group("processes, and --preset auto", "", own, rare=True),
        ]
        for section in ("", *SECTIONS):
            about = (type(start.section(section)).__doc__ or "").partition("\n")[0]
            flags = [a for a in rest.values() if a.section == section]
            groups.append(Group(section or "run", about, flags, rare=True))
        return [group for group in groups if group.arguments]

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        flags = read(cls.arguments(), argv)
        own = {a.name: flags.pop(a.key) for a in arguments_of(cls) if a.key in flags}
        settable = cls.settable(RunConfig())
        flags |= read_set(own.get("set", []), settable)
        path = own.get("config")
        file = SettingsFile() if path is None else read_settings(path, run_arguments(RunConfig(), cls.takes_auto))
        file = file.only({a.key for a in settable})
        cls.adapt(own, flags, file.values)
        return cls(settings=cls.resolve(own, file, flags), **own)

    @classmethod
    def resolve(cls, own: dict[str, Any], file: SettingsFile, flags: Values) -> Settings:
        """The settings. May add to the command's own values."""
        return resolve_settings(file, flags)

    @classmethod
    def adapt(cls, own: dict[str, Any], flags: Values, file: Values) -> None:
        """Check the command's own arguments, and add the settings that they stand for to `flags`."""


def run_arguments(start: RunConfig, takes_auto: bool = False) -> list[Argument]:
    """Every field of a run's configuration, with the defaults of `start`."""
    sections = ((section, start.section(section)) for section in ("", *SECTIONS))
    fields = [a for section, owner in sections for a in arguments_of(type(owner), section, owner)]
    names = Literal[(*PRESETS, AUTO)]
    return [dataclasses.replace(a, annotation=names) if takes_auto and a.key == PRESET else a for a in fields]


def resolve_settings(file: SettingsFile, flags: Values, planned: Values | None = None) -> Settings:
    """The settings from file and flags. Raises ConfigError if they do not fit each other, the data or the run.

    `planned` values stand for defaults of the preset.
    """
    values = (planned or {}) | file.values | flags
    start = start_of(values)
    if start.defaults.model.vocab_size and values.get(VOCABULARY) == 0:
        del values[VOCABULARY]  # 0 stands for the tokenizer's size, which the start has by now
    try:
        config = start.defaults.override(values)
        check_tuning(config)
        check_source(config.data, config.model.seq_len)
        start.check(config)
    except ConfigError as error:
        raise _name_source(error, start.defaults, file, flags) from None
    return Settings(config, start)


def check_tuning(config: RunConfig) -> None:
    """Raise ConfigError if settings for fine-tuning do not fit each other, or are given without a model to tune."""
    train = config.train
    if config.base and (config.upcycle or config.init_from):
        flag = "--upcycle" if config.upcycle else "--init-from"
        raise ConfigError(f"{flag} {config.upcycle or config.init_from}: not with sft --run; do one after the other")
    if config.base and config.data.format != "chat":
        raise ConfigError(f"--set data.format={config.data.format}: a run is fine-tuned on conversations; leave it out")
    if not config.base and not (config.init_from and config.data.format == "chat"):
        for section, name, plain in ((config.data, "format", "text"), (train, "lora_rank", 0)):
            if getattr(section, name) != plain:
                raise section.wrong(name, "is for fine-tuning; use `uv run python -m moe_jax sft --run RUN`")
        return
    if train.train_router and config.model.routing.balancing == "bias":
        why = "not with --set routing.balancing=bias, whose biases belong to the routers as they are; leave it out"
        raise ConfigError(f"--train-router: {why}")
    if train.lora_rank and train.optimizer == "muon":
        raise ConfigError("--optimizer muon: is for whole matrices; with --lora leave it out, or take adamw")
    if train.train_router and config.model.dense != "none":
        raise ConfigError("--train-router: this model is dense and has no router; leave it out")


def _name_source(error: ConfigError, start: RunConfig, file: SettingsFile, flags: Values) -> ConfigError:
    """The error to show. It names the file if the file has set the wrong field, or if the file is wrong by itself."""
    from_file = file.values.keys() - flags.keys()
    if not isinstance(error, FieldError):  # from `check_source`: the text does not exist
        return ConfigError(f"{file.path}: {error}") if ("data", "source") in from_file else error
    if error.field in from_file:
        return file.error(error.field, error.problem)
    try:
        start.override(file.values)
    except ConfigError:
        return ConfigError(f"{file.path}: {error}")
    return error


def typed_preset(argv: Sequence[str], default: str) -> RunConfig:
    """The preset from argv if it exists, else the default preset. Help must work even if other arguments are wrong."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    names = [name for flag, name in itertools.pairwise(words) if flag == "--preset"]
    return preset(names[-1] if names and names[-1] in PRESETS else default)


def read_set(texts: Iterable[str], arguments: Iterable[Argument]) -> Values:
    """The values of `--set SECTION.NAME=VALUE`. Raises ConfigError."""
    by_name = {f"{a.section}.{a.name}".lstrip("."): a for a in arguments}
    values: Values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        argument = by_name.get(name.strip().replace("-", "_"))
        if argument is None or not equals:
            hint = perhaps(name, {known: known for known in by_name})
            raise ConfigError(f"--set {text}: must be SECTION.NAME=VALUE with a field of the configuration{hint}")
        values[argument.key] = argument.from_text(value)
    return values


def read_settings(path: str, arguments: Iterable[Argument]) -> SettingsFile:
    """The settings of a file, with the right types. Raises a ConfigError that names the file and the key."""
    by_key = {a.key: a for a in arguments}
    values: Values = {}
    for (section, name), value in _entries(path, _load(path)):
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{path}: {_key(section, name)}: a whole number of more than 64 bits; give a smaller one")
        argument = by_key.get((section, name))
        if argument is None:
            known = {field: field for s, field in by_key if s == section} | {s: f"[{s}]" for s in SECTIONS}
            known |= {f"{s}.{field}": _key(s, field) for s, field in by_key if s != section}
            raise ConfigError(f"{path}: {_key(section, name)}: no such setting{perhaps(name, known)}")
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


# The preset and the steps for a text: `--preset auto`


class AutoPreset(NamedTuple):
    """What the user has typed with --preset auto, until the preset is chosen.

    The arguments are accepted first, with a preset that stands in for the chosen one. The run is then like any other:
    its config.json holds the name and the settings of a plain preset.
    """

    file: SettingsFile
    flags: Values
    minutes: float

    @property
    def typed(self) -> Values:
        """The user's changes to a preset."""
        return self.file.values | self.flags

    def stand_in(self) -> Settings:
        """The settings with the first preset that they fit. Raises ConfigError if they fit none."""
        return next(self._fitting(PRESETS))

    def choose(self) -> tuple[Settings, list[str]]:
        """The chosen settings, and the reasons."""
        with working("counting the tokens of the text"):
            from moe_jax.planning import auto

            source = self.typed.get(SOURCE, DataConfig.source)
            size = auto.text_bytes(source)
            starts = [settings.config for settings in self._fitting(auto.presets_for(source, size))]
            chosen, reasons = auto.choose(starts, size, self.minutes, self.typed)
        return self._resolve({PRESET: chosen.preset, auto.STEPS: chosen.train.steps}), reasons

    def _fitting(self, names: Iterable[str]) -> Iterator[Settings]:
        """The settings with each of the presets that they fit. Raises ConfigError if they fit none."""
        refused, fits = None, False
        for name in names:
            try:
                settings = self._resolve({PRESET: name})
            except ConfigError as error:
                refused = refused or error
                continue
            fits = True
            yield settings
        if refused is not None and not fits:
            raise refused

    def _resolve(self, planned: Values) -> Settings:
        return resolve_settings(self.file, self.flags, {OUT: folder_for_text(self.typed)} | planned)


def auto_preset(file: SettingsFile, flags: Values, minutes: float) -> AutoPreset | None:
    """The choice that `train.py` must make with --preset auto. None with another preset.

    Raises ConfigError if other flags do not go with --preset auto, or --minutes does not go without it.
    """
    values = file.values | flags
    if values.get(PRESET) != AUTO:
        if minutes:
            raise ConfigError(f"--minutes {minutes:g}: works only with --preset auto; add that, or give --steps")
        return None
    for name in ("resume", "upcycle", "init_from"):  # the run would not start from a preset's own shape
        if values.get(("", name)):
            named = f", and name the run: --out {values.get(OUT) or folder_for_text(values)}" * (name == "resume")
            raise ConfigError(f"--preset auto: chooses for a new model; leave it out with {flag_of('', name)}{named}")
    check_range("--minutes", minutes, 0, 1e6)
    file = SettingsFile(file.path, _without_preset(file.values))
    return AutoPreset(file, _without_preset(flags), minutes)


def folder_for_text(values: Values) -> str:
    """The folder of a run whose preset is chosen for a text, unless --out names one."""
    return f"runs/{Path(values.get(SOURCE, DataConfig.source)).resolve().stem or 'text'}"


def _without_preset(values: Values) -> Values:
    return {key: value for key, value in values.items() if key != PRESET}
