"""`train.py --preset auto`: the preset and the number of steps are chosen for the text, the memory and the time.

The arguments are accepted first, with a preset that stands in for the one that is chosen later. Choosing needs jax. The
run is then a run like any other: its config.json holds the name and the settings of a plain preset.
"""

from typing import NamedTuple

from moe_jax.cli.arguments import Values
from moe_jax.cli.command import check_range
from moe_jax.cli.settings import AUTO, OUT, PRESET, Settings, SettingsFile, resolve_settings
from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.config.presets import PRESETS, folder_for_text
from moe_jax.config.section import flag_of
from moe_jax.system.terminal import say, working

SOURCE = ("data", "source")
OTHER_STARTS = ("resume", "upcycle", "init_from")
"""Fields with which a run does not start from a preset's own shape."""


class Chosen(NamedTuple):
    """What --preset auto has chosen."""

    settings: Settings
    step_mib: float | None
    """MiB that the training step takes, by XLA's plan."""


class AutoPreset(NamedTuple):
    """What the user has asked for beside --preset auto, until the preset is chosen."""

    file: SettingsFile
    flags: Values
    memory: str
    minutes: float

    @classmethod
    def of(cls, file: SettingsFile, flags: Values, memory: str, minutes: float) -> "AutoPreset | None":
        """None if another preset is asked for. Raises ConfigError if the flags do not fit each other."""
        asked = file.values | flags
        if asked.get(PRESET) != AUTO:
            if memory:
                raise ConfigError(f"--memory {memory}: works only with --preset auto; add that, or leave it out")
            if minutes:
                raise ConfigError(f"--minutes {minutes:g}: works only with --preset auto; add that, or give --steps")
            return None
        for name in OTHER_STARTS:
            if asked.get(("", name)):
                out = asked.get(OUT) or folder_for_text(asked.get(SOURCE, "stories"))
                named = f", and name the run: --out {out}" * (name == "resume")
                raise ConfigError(
                    f"--preset auto: chooses for a new model; leave it out with {flag_of('', name)}{named}"
                )
        check_limits(memory, minutes)
        return cls(SettingsFile(file.path, _without_preset(file.values)), _without_preset(flags), memory, minutes)

    @property
    def asked(self) -> Values:
        """The user's changes to a preset."""
        return self.file.values | self.flags

    @property
    def source(self) -> str:
        return self.asked.get(SOURCE, "stories")

    def stand_in(self) -> Settings:
        """The settings with the first preset that they fit. Raises ConfigError if they fit none."""
        refused = None
        for name in PRESETS:
            try:
                return self._resolve({PRESET: name})
            except ConfigError as error:
                refused = refused or error
        assert refused is not None  # there is a preset
        raise refused

    def choose(self) -> Chosen:
        """Choose, and print the choice with its reasons. Raises UserError if nothing fits the memory."""
        from moe_jax.planning.auto import Limits, choose

        with working("counting the tokens of the text, and compiling training steps to see their memory"):
            limits = Limits.of(self.memory, self.minutes, self.stand_in().config)
            choice = choose(self.source, limits, change=self._change)
        config = choice.config
        if not choice.fits:
            raise UserError(f"--preset auto: nothing fits; {choice.reasons[-1]}; give more --memory")
        say(f"--preset auto: {config.preset}, {config.train.steps:,} steps", *choice.reasons, "")
        train = ("steps", "batch_size", "grad_accum")
        planned: Values = {("train", name): getattr(config.train, name) for name in train}
        planned |= {PRESET: config.preset, ("execution", "remat"): config.execution.remat}
        return Chosen(self._resolve(planned), choice.step_mib)

    def _change(self, config: RunConfig) -> RunConfig:
        return config.override({key: value for key, value in self.asked.items() if key != OUT})

    def _resolve(self, planned: Values) -> Settings:
        begin: Values = {OUT: folder_for_text(self.source), SOURCE: self.source}
        return resolve_settings(self.file, self.flags, begin | planned)


def check_limits(memory: str, minutes: float) -> None:
    """Raise ConfigError for a value of --memory or --minutes that is not allowed."""
    check_range("--minutes", minutes, 0, 1e6)
    if memory:
        from moe_jax.planning.auto import memory_bytes

        memory_bytes(memory)


def _without_preset(values: Values) -> Values:
    return {key: value for key, value in values.items() if key != PRESET}
