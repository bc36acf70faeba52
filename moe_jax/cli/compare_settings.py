"""The settings of the mixture that `compare` trains: those of a preset, changed by a settings file."""

from moe_jax.cli.origin import PRESET, override
from moe_jax.cli.settings import run_arguments
from moe_jax.cli.settings_file import read_settings
from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.compatibility import check_tuning, check_vocabulary
from moe_jax.system.errors import FieldError

OF_EACH_RUN = {
    *(("model", "dense"), ("execution", "mesh")),
    *(("train", name) for name in ("steps", "seed", "eval_every", "save_every", "patience")),
}
"""Settings that `compare` chooses for each run. It also chooses those outside a table, such as `out`."""


def changed_by_file(start: RunConfig, path: str) -> RunConfig:
    """The preset `start` with the settings of a TOML file. Raises ConfigError, which names the file and the key."""
    file = read_settings(path, run_arguments(RunConfig()))
    values = dict(file.values)
    named = values.pop(PRESET, start.preset)
    if named != start.preset:
        raise file.error(PRESET, f"--preset is {start.preset}; give --preset {named}, or leave this line out")
    for key in values:
        if key in OF_EACH_RUN or key[0] == "":
            raise file.error(key, "compare chooses this for each run; leave it out")
    try:
        config = override(start, values)
        check_tuning(config)
        check_vocabulary(config)
    except ConfigError as error:
        if isinstance(error, FieldError) and error.field in values:
            raise file.error(error.field, error.problem) from None
        raise ConfigError(f"{path}: {error}") from None
    return config
