"""The settings of `train.py` that `plan` takes too: `--config FILE`, and the flags of the model and of the training."""

import shlex
from collections.abc import Set
from typing import NamedTuple

from moe_jax.cli.arguments import Argument, Values
from moe_jax.cli.settings import PRESET, override, resolve_settings, run_arguments
from moe_jax.cli.settings_file import SettingsFile, read_settings
from moe_jax.config import RunConfig
from moe_jax.config.flags import flag_of
from moe_jax.config.presets import PLAN_ONLY

ON_A_CARD = "uv run --extra cuda12"
"""How a program is started on an NVIDIA card. CUDA 12 knows all cards that JAX knows, CUDA 13 those from compute
capability 7.5."""
_SECTIONS = ("model", "routing", "train", "execution")
_TOKENIZER = {("data", "tokenizer"), ("data", "vocab_size")}
"""The settings of data that decide the size of the model."""
_BY_OWN_FLAGS = {("execution", "mesh"), ("train", "lora_rank")}
"""`plan` has flags of its own for these."""
ORIGINS = ("preset", "init_from", "upcycle")
"""Fields of a settings file's first lines that `plan` reads. The others, such as `out`, do not change a plan."""
_PRINTED = {("train", "batch_size"), ("train", "grad_accum"), ("train", "optimizer"), ("execution", "remat")}
"""Settings that a plan chooses. Its command names them in any case."""


def setting_arguments(start: RunConfig) -> list[Argument]:
    """The settings of a run that `plan` takes, with the defaults of `start`."""
    found = (a for a in run_arguments(start) if a.section in _SECTIONS or a.key in _TOKENIZER)
    return [a for a in found if a.key not in _BY_OWN_FLAGS]


class Asked(NamedTuple):
    """The settings that the user has given beside the preset."""

    path: str = ""
    """The settings file. Empty without one."""
    file: Values = {}  # noqa: RUF012, a default that nobody changes
    flags: Values = {}  # noqa: RUF012

    @classmethod
    def of(cls, path: str, flags: Values) -> tuple["Asked", Values]:
        """The settings, and the preset or the model that the file starts from. Raises ConfigError."""
        values = read_settings(path, run_arguments(RunConfig())).values if path else {}
        keys = {a.key for a in setting_arguments(RunConfig())}
        origin = {key: value for key, value in values.items() if key[0] == "" and key[1] in ORIGINS}
        return cls(path, {key: value for key, value in values.items() if key in keys}, flags), origin

    def settings(self, preset: str, init_from: str = "", upcycle: str = "") -> RunConfig:
        """The settings of a preset or of a model, changed as the user asks. Raises ConfigError."""
        if preset in PLAN_ONLY:
            return override(PLAN_ONLY[preset](), self.file | self.flags)
        origin: Values = {PRESET: preset, ("", "init_from"): init_from, ("", "upcycle"): upcycle}
        return resolve_settings(SettingsFile(self.path, self.file), self.flags | origin).config

    def first_flag(self) -> str:
        """What the user has typed first, for an error. Empty if nothing was typed."""
        if self.path:
            return f"--config {self.path}"
        return next(iter(_words(self.flags)), "")

    def words(self, chosen: Set[tuple[str, str]] = frozenset()) -> list[str]:
        """The flags that repeat these settings in a command that names what a plan chooses, and the `chosen` fields."""
        kept = {key: value for key, value in self.flags.items() if key not in _PRINTED | chosen}
        return [f"--config {shlex.quote(self.path)}"] * bool(self.path) + _words(kept)


NOTHING_ASKED = Asked()


def _words(values: Values) -> list[str]:
    words = []
    for key, value in values.items():
        flag = flag_of(*key)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return words


def chosen_words(config: RunConfig) -> list[str]:
    """The flags of the settings that a plan chooses."""
    train = config.train
    words = [f"--batch-size {train.batch_size}", f"--grad-accum {train.grad_accum}", f"--optimizer {train.optimizer}"]
    return words + ["--execution.remat"] * config.execution.remat
