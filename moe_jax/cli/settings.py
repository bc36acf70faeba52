"""The settings of a run. They start from a preset, a run or a model (`training/start.py`), and flags change them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from moe_jax.cli.arguments import Argument, Values, arguments_of, perhaps, read
from moe_jax.cli.command import Command
from moe_jax.config import SECTIONS, ConfigError, PresetName, RunConfig
from moe_jax.config.presets import preset
from moe_jax.data.corpora import check_source
from moe_jax.training.start import Start, start_of

OUT, PRESET, SOURCE, VOCABULARY = ("", "out"), ("", "preset"), ("data", "source"), ("model", "vocab_size")
COMMON = (
    *("--preset", "--data", "--tokenizer", "--out", "--resume"),
    *("--steps", "--batch-size", "--lr", "--seed", "--precision", "--set"),
)
"""The usual flags of a run."""


class Settings(NamedTuple):
    """The settings of a run, and what the run starts from."""

    config: RunConfig
    start: Start


@dataclass(frozen=True)
class RunCommand(Command):
    """A command that takes every setting of a run."""

    usual: ClassVar[Sequence[str]] = (*COMMON, "--dry-run", "--run")
    preset: ClassVar[PresetName] = RunConfig.preset
    """The preset whose defaults help shows."""

    settings: Settings
    set: list[str] = field(default_factory=list)
    """SECTION.NAME=VALUE: any field of the configuration, such as train.beta2=0.99."""

    @classmethod
    def settable(cls) -> list[Argument]:
        """The settings that the command takes."""
        return run_arguments(preset(cls.preset))

    @classmethod
    def arguments(cls) -> list[Argument]:
        return [*arguments_of(cls), *cls.settable()]

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        flags = read(cls.arguments(), argv)
        own = {a.name: flags.pop(a.key) for a in arguments_of(cls) if a.key in flags}
        flags |= read_set(own.get("set", []), cls.settable())
        cls.adapt(own, flags)
        return cls(settings=cls.resolve(own, flags), **own)

    @classmethod
    def resolve(cls, own: dict[str, Any], flags: Values) -> Settings:
        """The settings. May add to the command's own values."""
        return resolve_settings(flags)

    @classmethod
    def adapt(cls, own: dict[str, Any], flags: Values) -> None:
        """Check the command's own arguments, and add the settings that they stand for to `flags`."""


def run_arguments(start: RunConfig) -> list[Argument]:
    """Every field of a run's configuration, with the defaults of `start`."""
    sections = ((section, start.section(section)) for section in ("", *SECTIONS))
    return [a for section, owner in sections for a in arguments_of(type(owner), section, owner)]


def resolve_settings(values: Values) -> Settings:
    """The settings from the values of flags. Raises ConfigError if they do not fit each other, the data or the run."""
    values = dict(values)
    start = start_of(values)
    if start.defaults.model.vocab_size and values.get(VOCABULARY) == 0:
        del values[VOCABULARY]  # 0 stands for the tokenizer's size, which the start has by now
    config = start.defaults.override(values)
    check_tuning(config)
    check_source(config.data)
    start.check(config)
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
