"""Checks before anything is written: outputs that cannot be, and training steps that cannot be in memory."""

import os
import secrets
from pathlib import Path

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.model.costs import least_step_bytes
from moe_jax.system.environment import (
    GIB,
    LEAST_ADDRESS_SPACE,
    address_space,
    check_limits,
    machine_memory,
    runs_on_cpu,
)


def check_memory(config: RunConfig) -> None:
    """Raise an error if a training step needs more memory than this machine or this process may have.

    Only for a CPU: the memory of a card is planned by `moe-jax plan`.
    """
    check_limits()
    if not runs_on_cpu():
        return
    least, memory, space = least_step_bytes(config), machine_memory(), address_space()
    needs = (
        f"--seq-len {config.model.seq_len}, --batch-size {config.train.batch_size}: a training step needs at least "
        f"{least / GIB:,.1f} GiB"
    )
    cure = "use a smaller --seq-len, --batch-size or model"
    if memory is not None and least > memory:
        raise ConfigError(f"{needs}, and this machine has {memory / GIB:,.1f} GiB; {cure}, or --execution.remat")
    if space is not None and least + LEAST_ADDRESS_SPACE > space:
        raise UserError(
            f"{needs}, JAX itself {LEAST_ADDRESS_SPACE / GIB:.0f} GiB, and ulimit -v {space // 1024} allows "
            f"{space / GIB:,.1f} GiB; raise the limit, or {cure}"
        )


def check_out_folder(flag: str, path: str | Path) -> None:
    """Raise ConfigError unless a folder of this name exists and can be written, or can be made."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{flag} {path}: is a file; name a folder")
    _check_writable(flag, Path(path), Path(path))


def check_new_folder(flag: str, path: str | Path) -> None:
    """Raise ConfigError unless a folder of this name can be made, or is there and empty."""
    check_out_folder(flag, path)
    if os.path.isdir(path) and os.listdir(path):
        raise ConfigError(f"{flag} {path}: is not empty; name a new folder")


def check_out_file(flag: str, path: str | Path) -> None:
    """Raise ConfigError unless a file of this name can be written, perhaps after its folder is made."""
    if os.path.isdir(path):
        raise ConfigError(f"{flag} {path}: is a folder; name a file")
    if os.path.islink(path) and not os.path.exists(path):
        raise ConfigError(f"{flag} {path}: is a link to something that does not exist; name a file")
    _check_writable(flag, Path(path), Path(path).parent)


def _check_writable(flag: str, path: Path, folder: Path) -> None:
    """Try to make a folder in `folder`, or in the nearest folder above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    draft = folder / f".{secrets.token_hex(8)}"
    try:
        draft.mkdir()
        draft.rmdir()
    except OSError as error:
        here = "" if folder == path else f"{folder} "
        raise ConfigError(f"{flag} {path}: {here}cannot be written ({error.strerror}); name another") from None
