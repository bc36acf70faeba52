"""Checks of what a command is told to write: status 2 before anything else, not an error after hours of work."""

import os
import secrets
from pathlib import Path

from moe_jax.config import ConfigError


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
    """Check the folder, or the nearest folder above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    here = "" if folder == path else f"{folder} "
    if not os.path.exists(folder):
        raise ConfigError(f"{flag} {path}: {here}is a link to something that does not exist; name another folder")
    if not os.path.isdir(folder):
        raise ConfigError(f"{flag} {path}: {here}is a file; name another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: {here}cannot be written (no permission, or read-only); name another folder")
    draft = folder / f".{secrets.token_hex(8)}"
    try:  # some file systems, such as /proc, say that they can be written and refuse
        draft.mkdir()
        draft.rmdir()
    except OSError as error:
        what = "nothing can be written there" if folder == path else "this folder cannot be made"
        raise ConfigError(f"{flag} {path}: {what} ({error.strerror}); name another") from None
