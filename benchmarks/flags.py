"""Settings of a run as the flags of `train.py`."""

from collections.abc import Container, Iterator

from moe_jax.config import RunConfig
from moe_jax.config.section import flag_of


def flags(config: RunConfig, left_out: Container[tuple[str, str]] = ()) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """(section, name) of each setting, and the words that give it its value: a switch that is off is
    `--SECTION.no-NAME`."""
    for section, name, value in config.settings():
        if (section, name) in left_out:
            continue
        flag = flag_of(config.section(section), name)
        if value is False:
            dashes, dot, last = flag.rpartition(".")
            flag = f"{dashes}.no-{last}" if dot else f"--no-{last.removeprefix('--')}"
        yield (section, name), [flag] if isinstance(value, bool) else [flag, str(value)]
