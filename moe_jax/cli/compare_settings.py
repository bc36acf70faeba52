"""The settings of the mixture that `compare` trains: those of a preset, changed by a settings file and by --data."""

from moe_jax.cli.arguments import Values
from moe_jax.cli.origin import PRESET
from moe_jax.cli.settings import resolve_settings, run_arguments
from moe_jax.cli.settings_file import SettingsFile, read_settings
from moe_jax.config import RunConfig

OF_EACH_RUN = {
    *(("model", "dense"), ("execution", "mesh")),
    *(("train", name) for name in ("steps", "seed", "eval_every", "save_every", "patience")),
}
"""Settings that `compare` chooses for each run. It also chooses those outside a table, such as `out`."""


def settings_to_compare(preset: str, path: str, data: str) -> RunConfig:
    """The settings of a preset, with those of the TOML file at `path` and the text `data`. Both can be empty.

    Raises ConfigError, which names the file and the key where the file is wrong.
    """
    file = read_settings(path, run_arguments(RunConfig())) if path else SettingsFile()
    named = file.values.get(PRESET, preset)
    if named != preset:
        raise file.error(PRESET, f"--preset is {preset}; give --preset {named}, or leave this line out")
    for key in file.values:
        if key in OF_EACH_RUN or (key[0] == "" and key != PRESET):
            raise file.error(key, "compare chooses this for each run; leave it out")
    flags: Values = {PRESET: preset}
    if data:
        flags["data", "source"] = data
    return resolve_settings(file, flags).config
