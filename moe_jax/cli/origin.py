"""What the settings of a run start from: a preset, a run that is resumed or starts again, or a model.

The settings that name the origin are read first. The other settings must fit only the origin that they change.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from moe_jax.cli.arguments import Values
from moe_jax.config import SECTIONS, RunConfig, load_begun_config, load_config
from moe_jax.config.compatibility import (
    check_restartable,
    check_resumable,
    check_vocabulary,
    without_own_vocabulary,
)
from moe_jax.config.presets import preset
from moe_jax.interop.starting_point import StartingPoint, starting_point

NAMES = {("", name) for name in ("preset", "out", "resume", "upcycle", "init_from", "base")} | {("model", "dense")}
"""Fields that name the origin: the preset, and the fields that give `RunConfig.run_dir`."""
PRESET = ("", "preset")


class Origin(NamedTuple):
    """What the settings start from."""

    start: RunConfig
    saved: RunConfig | None = None
    """The configuration of the run that is resumed."""
    begun: RunConfig | None = None
    """The configuration of a run that starts again, because it ended before its first checkpoint."""
    source: StartingPoint | None = None
    """What a new run starts from that does not start from noise."""

    @classmethod
    def of(cls, given: Values) -> "Origin":
        """What the values name. Raises ConfigError where it is not there, UserError where it cannot be read."""
        named = {key: value for key, value in given.items() if key in NAMES}
        start = preset(given.get(PRESET, RunConfig.preset))
        asked = override(start, named)
        # The weights of an import are in the checkpoints of its run, so a resume does not look for their folder.
        found = cls._in_folder(asked) if asked.resume and (asked.init_from or asked.out) else None
        if found is None:
            source = starting_point(asked, *_tuning(given))
            if source is not None:
                start = source.defaults
                asked = override(start, named)
            found = cls._in_folder(asked) if asked.resume else None
            if found is None:
                return cls(start, source=source)
        if found.begun is None:
            return found
        return found._replace(source=starting_point(override(found.start, named), *_tuning(given)))

    @classmethod
    def _in_folder(cls, asked: RunConfig) -> "Origin | None":
        """The run in the folder of the settings. None if no run has begun there."""
        run = Path(asked.run_dir)
        # A folder may have been copied or renamed, so its path comes from the command and not from its config.json.
        if (saved := load_config(run)) is not None:
            saved = dataclasses.replace(saved, out=asked.run_dir)
            return cls(saved, saved=saved)
        if (begun := load_begun_config(run)) is not None:
            begun = dataclasses.replace(begun, out=asked.run_dir)
            return cls(begun, begun=begun)
        return None

    def without_own_vocabulary(self) -> "Origin":
        """The same origin. A run that starts again from noise gets the vocabulary size of its new tokenizer."""
        again = self.begun is not None and self.source is None
        return self._replace(start=without_own_vocabulary(self.start)) if again else self

    def check_vocabulary(self, config: RunConfig) -> None:
        """Raise ConfigError if the model of a run that starts from noise may lack entries of its tokenizer."""
        if self.saved is None and self.source is None:
            check_vocabulary(config)

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError if the changed settings do not fit the run or the model that they start from."""
        if self.saved is not None:
            check_resumable(self.saved, config)
        if self.begun is not None:
            check_restartable(self.begun, config)
        if self.source is not None:
            self.source.check(config)


def override(start: RunConfig, values: Values) -> RunConfig:
    """`start` with some values replaced. Raises FieldError if the values do not fit each other."""
    changes = {section: {n: v for (s, n), v in values.items() if s == section} for section in ("", *SECTIONS)}
    routing = dataclasses.replace(start.model.routing, **changes["routing"])
    return dataclasses.replace(
        start,
        **changes[""],
        model=dataclasses.replace(start.model, routing=routing, **changes["model"]),
        data=dataclasses.replace(start.data, **changes["data"]),
        train=dataclasses.replace(start.train, **changes["train"]),
        execution=dataclasses.replace(start.execution, **changes["execution"]),
    )


def _tuning(given: Values) -> tuple[bool, bool]:
    """Whether the settings are for fine-tuning, and whether with adapters."""
    return given.get(("data", "format")) == "chat", bool(given.get(("train", "lora_rank")))
