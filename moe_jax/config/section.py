"""What the sections of a configuration share: the flags of their fields, and the checks of their values.

`--set section.field=VALUE` sets every field. The fields that people change are flags too: `--section.field` with
hyphens for underscores, and a short name for the most used ones. A field made by `no_flag` is one that a preset, an
imported model or a careful experiment sets. Standard library only.
"""

import dataclasses
from typing import Any, ClassVar, Literal, get_args, get_origin

from moe_jax.system.errors import ConfigError

SHORT_FLAGS = {
    "--data": "--data.source",
    "--tokenizer": "--data.tokenizer",
    "--steps": "--train.steps",
    "--batch-size": "--train.batch-size",
    "--grad-accum": "--train.grad-accum",
    "--lr": "--train.lr",
    "--optimizer": "--train.optimizer",
    "--lora": "--train.lora-rank",
    "--train-router": "--train.train-router",
    "--seed": "--train.seed",
    "--eval-every": "--train.eval-every",
    "--save-every": "--train.save-every",
    "--precision": "--execution.compute-dtype",
    "--deterministic": "--execution.deterministic",
    "--mesh": "--execution.mesh",
    "--fit": "--execution.fit",
    "--memory": "--execution.memory",
    "--seq-len": "--model.seq-len",
    "--experts": "--model.experts",
    "--top-k": "--routing.top-k",
    "--capacity-factor": "--routing.capacity-factor",
    "--dispatch": "--routing.dispatch",
}
"""Short name -> long name."""

_SHORT_OF = {long: short for short, long in SHORT_FLAGS.items()}
_WITHOUT_FLAG: set[tuple[str, str]] = set()
"""(section, name) of every field without a flag. `Section` fills it."""


def no_flag[T](default: T) -> T:
    """The default of a field that has no flag."""
    return dataclasses.field(default=default, metadata={"no_flag": True})  # pyright: ignore[reportReturnType]


class Section:
    """Base class of the frozen dataclasses that make up a configuration."""

    section_name: ClassVar[str]
    """Its name in `config.json` and in flags. Empty for `RunConfig` itself."""

    def __init_subclass__(cls, section: str) -> None:
        cls.section_name = section
        fields = {name: value for name, value in vars(cls).items() if isinstance(value, dataclasses.Field)}
        _WITHOUT_FLAG.update((section, name) for name, f in fields.items() if f.metadata.get("no_flag"))

    def check(self, ok: bool, name: str, allowed: str) -> None:
        """Raise ConfigError unless `ok`: "--flag value: must be ALLOWED"."""
        if not ok:
            raise self.wrong(name, f"must be {allowed}")

    def wrong(self, name: str, problem: str) -> ConfigError:
        """The error for a field's value: "--flag value: PROBLEM"."""
        return ConfigError(f"{typed(self.section_name, name, getattr(self, name))}: {problem}")

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

    def plain_fields(self) -> list[tuple[str, str, Any]]:
        """(section, name, value) of every field that is not itself a section."""
        values = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        return [(self.section_name, name, value) for name, value in values if not isinstance(value, Section)]


def long_flag(section: str, name: str) -> str:
    """The long flag of a field: ("train", "batch_size") -> "--train.batch-size"."""
    return "--" + f"{section}.{name}".lstrip(".").replace("_", "-")


def flag_of(section: str, name: str) -> str:
    """What errors call a field: its flag, the short one if there is one. ("train", "steps") -> "--steps".

    Of a field without a flag: ("train", "beta2") -> "--set train.beta2".
    """
    if (section, name) in _WITHOUT_FLAG:
        return f"--set {section}.{name}".replace(" .", " ")
    long = long_flag(section, name)
    return _SHORT_OF.get(long, long)


def typed(section: str, name: str, value: object) -> str:
    """A setting as it is typed on a command line: "--steps 100", or "--set train.beta2=0.9"."""
    return f"{flag_of(section, name)}{'=' if (section, name) in _WITHOUT_FLAG else ' '}{value}"


def word(section: str, name: str, value: object) -> str:
    """A setting as one word of argv: "--steps=100", "--set", "model.tied_head=false", or "--set=train.beta2=0.9"."""
    flag = flag_of(section, name)
    if (section, name) in _WITHOUT_FLAG:
        return f"{flag.replace(' ', '=')}={str(value).lower() if isinstance(value, bool) else value}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag.removeprefix('--')}"
    return f"{flag}={value}"


def format_bound(bound: float) -> str:
    """A limit as an error shows it, such as 1,000,000 or 0.5."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
