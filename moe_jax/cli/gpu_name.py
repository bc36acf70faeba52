"""The card that `plan --gpu` names: one of those that come with the package, or a file that describes one."""

import os
from pathlib import Path

from moe_jax.config import ConfigError

TARGETS = Path(__file__).parents[1] / "planning" / "targets"
"""Folder of the GPU descriptions that come with the package."""
DEFAULT_GPU = "rtx3050-4gb"
LONGEST_DESCRIPTION = 1 << 20
"""Bytes. The descriptions that come with the package have about 2,000."""


def check_gpu(name: str) -> None:
    """Raise ConfigError unless this is the name of a described GPU, or a file that describes one."""
    names = sorted(p.stem for p in TARGETS.glob("*.txtpb"))
    if name in names:
        return
    if not Path(name).is_file():
        if os.sep in name or Path(name).suffix:
            raise ConfigError(f"--gpu {name}: there is no such file; the names are {', '.join(names)}")
        near = [known for known in names if _plain(name) and _plain(name) in _plain(known)]
        meant = f"; perhaps {' or '.join(near)} was meant" if near else ""
        raise ConfigError(f"--gpu {name}: must be one of {', '.join(names)}, or a file that describes a GPU{meant}")
    with open(name, "rb") as file:
        start = file.read(LONGEST_DESCRIPTION + 1)
    if len(start) > LONGEST_DESCRIPTION or b"\0" in start or b"device_memory_size" not in start:
        raise ConfigError(f"--gpu {name}: does not describe a GPU; the files in {TARGETS} show how one does")


def _plain(name: str) -> str:
    """The letters and digits of a name: "RTX 3060" and "rtx3060-12gb" begin alike."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
