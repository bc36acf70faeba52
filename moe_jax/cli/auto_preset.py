"""The preset and the steps for a text, a memory and a time: `train.py --preset auto`, and `plan --data` and `--memory`.

The arguments are accepted first, with a preset that stands in for the one that is chosen later. Choosing needs jax. The
run is then a run like any other: its config.json holds the name and the settings of a plain preset.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.cli.arguments import Values
from moe_jax.cli.command import check_range
from moe_jax.cli.settings import AUTO, OUT, PRESET, SOURCE, Settings, SettingsFile, resolve_settings
from moe_jax.config import ConfigError
from moe_jax.config.presets import PRESETS, folder_for_text
from moe_jax.config.section import flag_of
from moe_jax.system.terminal import working

if TYPE_CHECKING:
    from moe_jax.planning.auto import Choice, Limits

OTHER_STARTS = ("resume", "upcycle", "init_from")
"""Fields with which a run does not start from a preset's own shape."""


class AutoPreset(NamedTuple):
    """What the user has typed, until the preset is chosen. A preset that is typed stays."""

    file: SettingsFile
    flags: Values
    memory: str
    minutes: float

    @classmethod
    def of(cls, file: SettingsFile, flags: Values, memory: str, minutes: float) -> "AutoPreset":
        """Raises ConfigError for a memory or a time that is not allowed."""
        check_range("--minutes", minutes, 0, 1e6)
        if memory:
            from moe_jax.planning.auto import memory_bytes

            memory_bytes(memory)
        return cls(SettingsFile(file.path, _without_auto(file.values)), _without_auto(flags), memory, minutes)

    @property
    def typed(self) -> Values:
        """The user's changes to a preset."""
        return self.file.values | self.flags

    @property
    def source(self) -> str:
        return self.typed.get(SOURCE, "stories")

    def stand_in(self) -> Settings:
        """The settings with the first preset that they fit. Raises ConfigError if they fit none."""
        return next(self._fitting(PRESETS))

    def choose(self) -> "tuple[Settings, Choice, Limits]":
        """The chosen settings. Compiles training steps."""
        with working("counting the tokens of the text, and compiling training steps to see their memory"):
            from moe_jax.planning import auto
            from moe_jax.planning.auto import Limits

            limits = Limits.of(self.memory, self.minutes, self.stand_in().config)
            size = auto.text_bytes(self.source)
            starts = [settings.config for settings in self._fitting(auto.presets_for(self.source, size))]
            choice = auto.choose(starts, size, limits, self.typed)
        train, remat = choice.config.train, choice.config.execution.remat
        planned: Values = {auto.STEPS: train.steps, auto.BATCH: train.batch_size, auto.ACCUMULATION: train.grad_accum}
        return self._resolve(planned | {PRESET: choice.config.preset, auto.REMAT: remat}), choice, limits

    def _fitting(self, names: Iterable[str]) -> Iterator[Settings]:
        """The settings with each of the presets that they fit. Raises ConfigError if they fit none."""
        refused, fits = None, False
        for name in [self.typed[PRESET]] if PRESET in self.typed else names:
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
        begin: Values = {OUT: folder_for_text(self.source), SOURCE: self.source}
        return resolve_settings(self.file, self.flags, begin | planned)


def auto_preset(file: SettingsFile, flags: Values, memory: str, minutes: float) -> AutoPreset | None:
    """What the flags of `train.py` ask of --preset auto. None for another preset.

    Raises ConfigError if the flags do not fit.
    """
    values = file.values | flags
    if values.get(PRESET) != AUTO:
        if memory:
            raise ConfigError(f"--memory {memory}: works only with --preset auto; add that, or leave it out")
        if minutes:
            raise ConfigError(f"--minutes {minutes:g}: works only with --preset auto; add that, or give --steps")
        return None
    for name in OTHER_STARTS:
        if values.get(("", name)):
            out = values.get(OUT) or folder_for_text(values.get(SOURCE, "stories"))
            named = f", and name the run: --out {out}" * (name == "resume")
            raise ConfigError(f"--preset auto: chooses for a new model; leave it out with {flag_of('', name)}{named}")
    return AutoPreset.of(file, flags, memory, minutes)


def _without_auto(values: Values) -> Values:
    return {key: value for key, value in values.items() if (key, value) != (PRESET, AUTO)}
